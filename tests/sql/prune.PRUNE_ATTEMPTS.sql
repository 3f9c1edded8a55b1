with head as materialized (
    select secondary.backend_id, attempt.row_id,
           attempt.finished_at not between statement_timestamp() - cast($1 as interval)
               and statement_timestamp() + cast($1 as interval) as old
    from "public".outbox_secondary as secondary
    cross join lateral (
        select attempt.ctid as row_id, attempt.finished_at
        from "public".outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.attempt_id <= secondary.folded_through
        order by attempt.attempt_id
        limit $2
    ) as attempt
), gone as (
    delete from "public".outbox_attempt where ctid = any (array(select row_id from head where old))
)
select exists (select from head group by backend_id having bool_and(old) and count(*) = $2)
