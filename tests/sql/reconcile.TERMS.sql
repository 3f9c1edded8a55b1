select tenant_ids, resource_types from "public".outbox_secondary where backend_id = $1
