select count(*) from "public".outbox_attempt as attempt
where attempt.backend_id = $1 and attempt.finished_at is null
