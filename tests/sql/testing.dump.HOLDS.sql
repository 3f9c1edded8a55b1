select hold.backend_id, hold.tenant_id, hold.resource_type, hold.resource_id, hold.state, hold.oldest_id,
       hold.attempts, array(
           select unnest(page.event_ids)
           from "public".outbox_hold as page
           where page.backend_id = hold.backend_id and page.key_hash = hold.key_hash
             and page.tenant_id = hold.tenant_id and page.resource_type = hold.resource_type
             and page.resource_id = hold.resource_id
           order by 1
       ) as event_ids
from "public".outbox_hold as hold
where hold.page = 0
order by hold.backend_id, hold.tenant_id, hold.resource_type, hold.resource_id
