select backend_id from "public".outbox_secondary where status = 'shadow'
