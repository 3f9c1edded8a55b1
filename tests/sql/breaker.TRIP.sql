update "public".outbox_secondary as secondary
set breaker = case when opens then 'open' else secondary.breaker end,
    breaker_failures = secondary.breaker_failures + 1,
    breaker_opens = secondary.breaker_opens + cast(opens as integer),
    breaker_ramp = case when opens then null else secondary.breaker_ramp end,
    breaker_until = case
        when opens then statement_timestamp() + greatest(
            cast($1 as interval),
            least(cast($2 as interval), cast($3 as interval) * power(2, least(secondary.breaker_opens, 30)))
                * (0.5 + random() / 2))
        else secondary.breaker_until end
from (
    select backend_id,
           breaker = 'half_open' or breaker = 'closed'
               and (breaker_failures + 1 >= $4 or cast($1 as interval) > interval '0') as opens
    from "public".outbox_secondary
    where backend_id = $5 and exists (
        select from "public".outbox_attempt as attempt
        where attempt.backend_id = $5 and attempt.attempt_id = $6
          and attempt.relay_id = cast($7 as uuid) and attempt.finished_at is null
    )
    for update
) as found
where secondary.backend_id = found.backend_id
