with waiting as materialized (
    select hold.row_id
    from unnest(array[false, true]) as kind (alone)
    cross join lateral (
        select hold.ctid as row_id from "public".outbox_hold as hold
        where hold.backend_id = $1 and hold.alone = kind.alone
          and hold.next_attempt_at > statement_timestamp()
        order by hold.next_attempt_at
        offset 0
    ) as hold
), held as (
    update "public".outbox_hold
    set next_attempt_at = next_attempt_at - cast($2 as interval)
    where ctid = any (array(select row_id from waiting))
), leased as (
    update "public".outbox_attempt
    set lease_until = lease_until - cast($2 as interval)
    where backend_id = $1 and attempt_id > $3 and finished_at is null
      and lease_until > statement_timestamp() + cast($2 as interval)
)
update "public".outbox_secondary
set looked_at = statement_timestamp(), breaker_until = breaker_until - cast($2 as interval)
where backend_id = $1
