select secondary.backend_id, secondary.status from "public".outbox_secondary as secondary order by secondary.backend_id
