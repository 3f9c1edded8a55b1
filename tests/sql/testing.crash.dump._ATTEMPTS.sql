select attempt.*, cast(extract(epoch from started_at) * 1000000 as bigint) as started,
       coalesce(cast(extract(epoch from finished_at) * 1000000 as bigint), 0) as finished
from "public".outbox_attempt as attempt order by attempt_id
