select backend_id from "public".outbox_secondary where backend_id = $1 for no key update
