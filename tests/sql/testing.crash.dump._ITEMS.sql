select tenant_id, resource_id, content from "public".item
