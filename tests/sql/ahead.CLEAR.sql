update "public".outbox_secondary
set beyond = null, doubted_at = statement_timestamp()
where beyond <= cast($1 as bigint)
   or backend_id = any (cast($2 as text[]))
returning backend_id
