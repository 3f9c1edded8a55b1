with scrubbed as (
    update "public".outbox_hold as hold
    set error = null,
        state = case when hold.state = 'dead' or hold.state = 'retrying' and hold.next_attempt_at is not null then 'released' else hold.state end,
        attempts = case when hold.state = 'dead' or hold.state = 'retrying' and hold.next_attempt_at is not null then 0 else hold.attempts end,
        lost = case when hold.state = 'dead' or hold.state = 'retrying' and hold.next_attempt_at is not null then 0 else hold.lost end,
        first_failed_at = case when hold.state = 'dead' or hold.state = 'retrying' and hold.next_attempt_at is not null then null else hold.first_failed_at end,
        next_attempt_at = case when hold.state = 'dead' or hold.state = 'retrying' and hold.next_attempt_at is not null then statement_timestamp() else hold.next_attempt_at end
    where hold.backend_id = any (array(select backend_id from "public".outbox_secondary))
      and hold.key_hash = hashtextextended(
          cast($1 as text) || '/' || cast($2 as text) || '/' || cast($3 as text), 0
      )
      and hold.tenant_id = $1 and hold.resource_type = $2 and hold.resource_id = $3
      and hold.page = 0 and (hold.error is not null or hold.state = 'dead' or hold.state = 'retrying' and hold.next_attempt_at is not null)
    returning hold.backend_id
)
select count(*) from scrubbed
