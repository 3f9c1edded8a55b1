select discarded.backend_id, discarded.event_id, discarded.oldest_id, discarded.attempts, discarded.error_code,
       discarded.reason, discarded.discarded_at
from "public".outbox_secondary as secondary
cross join lateral (
    select discarded.* from "public".outbox_discarded as discarded
    where discarded.backend_id = secondary.backend_id
      and discarded.key_hash = hashtextextended(
          cast($1 as text) || '/' || cast($2 as text) || '/' || cast($3 as text), 0
      )
      and discarded.tenant_id = $1 and discarded.resource_type = $2
      and discarded.resource_id = $3
    offset 0
) as discarded
order by discarded.backend_id, discarded.event_id desc
