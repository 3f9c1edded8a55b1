update "public".outbox_secondary
set looked_at = statement_timestamp()
where backend_id = $1
  and (looked_at is null
       or looked_at not between statement_timestamp() - cast($2 as interval) / 2 and statement_timestamp())
