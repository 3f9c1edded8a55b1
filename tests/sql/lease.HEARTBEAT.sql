update "public".outbox_attempt as attempt
set lease_until = clock_timestamp() + cast($1 as interval)
from unnest(cast($2 as text[]), cast($3 as bigint[])) as mine (backend_id, attempt_id)
where attempt.backend_id = mine.backend_id and attempt.attempt_id = mine.attempt_id
  and attempt.relay_id = cast($4 as uuid) and attempt.finished_at is null
returning attempt.attempt_id
