update "public".outbox_secondary
set proof_begun_at = statement_timestamp()
where backend_id = $1 and status = 'live'
  and coalesce(proof_begun_at, registered_at) <= statement_timestamp() - cast($2 as interval)
returning backend_id
