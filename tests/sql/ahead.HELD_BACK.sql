select backend_id, beyond from "public".outbox_secondary where beyond is not null
