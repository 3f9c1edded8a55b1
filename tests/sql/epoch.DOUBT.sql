update "public".outbox_secondary
set beyond = greatest(beyond, cast($1 as bigint)), doubted_at = statement_timestamp()
where backend_id = $2
