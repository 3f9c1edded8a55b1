select backend_id, event_id from "public".outbox_delivery order by backend_id, event_id
