select event.event_id, event.operation, event.version,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at,
       cast(event.headers as text) as headers, count(*) over () as kept
from "public".outbox as event
where event.tenant_id = $1 and event.resource_type = $2 and event.resource_id = $3
order by event.event_id desc
limit 100
