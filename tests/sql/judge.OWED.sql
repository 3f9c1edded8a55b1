with suspect as materialized (
    select suspect.resource_id,
           hashtextextended(
               cast($1 as text) || '/' || cast($2 as text) || '/' || suspect.resource_id, 0
           ) as key_hash
    from unnest(cast($3 as text[])) as suspect (resource_id)
), owed as materialized (
    select delivery.key_hash, 'owed' as why
    from "public".outbox_delivery as delivery
    where delivery.backend_id = $4
      and delivery.lane = cast(hashtextextended(cast($1 as text), 0) & 63 as smallint)
      and delivery.key_hash in (select key_hash from suspect)
    union all
    select unnest(attempt.key_hashes), 'owed'
    from "public".outbox_secondary as secondary
    join "public".outbox_attempt as attempt
      on attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
    where secondary.backend_id = $4 and attempt.finished_at is null
    union all
    select hold.key_hash, case hold.state when 'dead' then 'dead' when 'retrying' then 'failing' else 'owed' end
    from "public".outbox_hold as hold
    where hold.backend_id = $4
)
select suspect.resource_id, min(owed.why) as why
from suspect join owed on owed.key_hash = suspect.key_hash
group by suspect.resource_id
