delete from "public".outbox_hold as hold
where hold.backend_id = $1 and hold.event_ids = '{}' and hold.key_hash not in (
    select unnest(attempt.key_hashes)
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.attempt_id > $2 and attempt.finished_at is null
)
