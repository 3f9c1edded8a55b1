update "public".outbox_secondary
set proof_at = statement_timestamp(), proof_standing = cast(cast($1 as text) as json)
where backend_id = $2
