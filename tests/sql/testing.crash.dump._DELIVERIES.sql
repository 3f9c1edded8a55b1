select backend_id, array_agg(event_id order by event_id) as positions from "public".outbox_delivery group by backend_id
