select clock_timestamp() as at, coalesce((select max(event_id) from "public".outbox), 0) as position
