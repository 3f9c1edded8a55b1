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
), compared as (
    update "public".outbox_reconciliation
    set started_at = case when started_at > statement_timestamp() then started_at - cast($2 as interval)
                          else started_at end,
        finished_at = finished_at - cast($2 as interval)
    where backend_id = $1 and finished_at > statement_timestamp()
)
update "public".outbox_secondary as secondary
set looked_at = statement_timestamp(), breaker_until = breaker_until - cast($2 as interval),
    proof_at = case when proof_at > statement_timestamp() then proof_at - cast($2 as interval)
                    else proof_at end,
    doubted_at = case when doubted_at > statement_timestamp() then greatest(doubted_at - cast($2 as interval), (
                          select max(run.started_at) from "public".outbox_reconciliation as run
                          where run.backend_id = secondary.backend_id and run.tenant_id is null
                            and run.resource_type is null and run.started_at <= statement_timestamp()
                      ))
                      else doubted_at end,
    registered_at = case when registered_at > statement_timestamp() then registered_at - cast($2 as interval)
                         else registered_at end
where secondary.backend_id = $1
