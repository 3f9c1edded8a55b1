select event.event_id, cast(event.content as text) as content
from "public".outbox as event
where event.event_id = any (cast($1 as bigint[])) and exists (
    select from "public".outbox_attempt as attempt
    where attempt.backend_id = $2 and attempt.attempt_id = $3
      and attempt.relay_id = cast($4 as uuid) and attempt.finished_at is null
)
