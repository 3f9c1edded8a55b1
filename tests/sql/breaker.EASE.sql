update "public".outbox_secondary as secondary
set breaker = 'closed', breaker_failures = 0, breaker_opens = 0, breaker_until = null,
    breaker_ramp = case
        when secondary.breaker <> 'closed' then 2
        when secondary.breaker_ramp * 2 < $1 then secondary.breaker_ramp * 2 end
where secondary.backend_id = $2
