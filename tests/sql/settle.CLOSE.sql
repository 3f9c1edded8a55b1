update "public".outbox_attempt as attempt
set finished_at = clock_timestamp(), applied = $1, stale = $2,
    superseded = attempt.superseded + cast($3 as integer)
where attempt.backend_id = $4 and attempt.attempt_id = $5 and attempt.finished_at is null
  and attempt.relay_id = cast($6 as uuid)
returning attempt.attempt_id
