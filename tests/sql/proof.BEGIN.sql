update "public".outbox_secondary
set proof_at = statement_timestamp()
where backend_id = $1 and status = 'live'
  and (coalesce(proof_at, registered_at) <= statement_timestamp()
           - case when proof_standing is null then cast($2 as interval) else cast($3 as interval) end
       or proof_standing is null and coalesce(proof_at, registered_at) <= doubted_at)
returning coalesce(cast(proof_standing as text), '') as standing
