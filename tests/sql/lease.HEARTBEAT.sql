update "public".outbox_attempt as attempt
set lease_until = clock_timestamp() + cast($1 as interval)
where attempt.backend_id = $2 and attempt.attempt_id = any (cast($3 as bigint[]))
  and attempt.attempt_id between cast($4 as bigint) and cast($5 as bigint)
  and attempt.relay_id = cast($6 as uuid) and attempt.finished_at is null
returning attempt.attempt_id
