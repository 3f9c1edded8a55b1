update "public".outbox_secondary
set breaker = 'half_open', breaker_until = statement_timestamp() + cast($1 as interval)
where backend_id = $2
