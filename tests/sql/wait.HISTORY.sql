with recent as materialized (
    select attempt.backend_id, attempt.attempt_id, owed.event_id,
           secondary.ordering = 'state'
               and max(owed.event_id) over (partition by attempt.attempt_id, owed.key_hash) > owed.event_id as passed
    from "public".outbox_secondary as secondary
    cross join lateral (
        select * from "public".outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id
        order by attempt.attempt_id desc
        limit 100
    ) as attempt
    cross join lateral unnest(attempt.event_ids, attempt.key_hashes) as owed (event_id, key_hash)
    where secondary.backend_id = any (cast($1 as text[])) and attempt.released < cardinality(attempt.event_ids)
      and exists (
          select from unnest(attempt.event_ids) as owed (event_id)
          where owed.event_id = any (cast($2 as bigint[]))
      )
)
select asked.*, count(*) as attempts,
       (array_agg(recent.passed order by recent.attempt_id desc))[1] as superseded
from unnest(cast($3 as text[]), cast($2 as bigint[]), cast($4 as bigint[]))
    as asked (backend_id, event_id, stamp)
join recent on recent.backend_id = asked.backend_id and recent.event_id = asked.event_id
group by asked.backend_id, asked.event_id, asked.stamp
