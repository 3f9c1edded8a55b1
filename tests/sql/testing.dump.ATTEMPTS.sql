select backend_id, attempt_id, cast(relay_id as text) as relay_id, event_ids,
       cast(extract(epoch from started_at) * 1000000 as bigint) as started,
       cast(coalesce(extract(epoch from finished_at) * 1000000, 0) as bigint) as finished,
       applied, stale, superseded, retried, rejected, released, lost
from "public".outbox_attempt
order by backend_id, attempt_id
