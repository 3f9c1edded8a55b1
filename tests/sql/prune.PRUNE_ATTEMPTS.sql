with head as materialized (
    select secondary.backend_id, attempt.row_id, attempt.attempt_id,
           attempt.finished_at not between statement_timestamp() - cast($1 as interval)
               and statement_timestamp() + cast($1 as interval) as old
    from "public".outbox_secondary as secondary
    cross join lateral (
        select attempt.ctid as row_id, attempt.attempt_id, attempt.finished_at
        from "public".outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.attempt_id <= secondary.folded_through
          and attempt.attempt_id > coalesce((
              select walked.through
              from unnest(cast($2 as text[]), cast($3 as bigint[])) as walked (backend_id, through)
              where walked.backend_id = secondary.backend_id
          ), 0)
        order by attempt.attempt_id
        limit $4
    ) as attempt
), gone as (
    delete from "public".outbox_attempt where ctid = any (array(select row_id from head where old))
)
select backend_id, coalesce(min(attempt_id) filter (where not old) - 1, max(attempt_id)) as through,
       bool_and(old) and count(*) = $4 as more
from head
group by backend_id
