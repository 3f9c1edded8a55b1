update "public".outbox_secondary
set beyond = null, doubted_at = statement_timestamp()
where backend_id = any (cast($1 as text[]))
