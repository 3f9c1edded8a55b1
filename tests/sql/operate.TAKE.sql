select from "public".outbox_hold as hold
where 
    hold.state in ('retrying', 'dead') and (hold.state = 'dead' or hold.next_attempt_at is not null)
      and (cast($1 as text) is null or hold.backend_id = $1)
      and (cast($2 as text) is null or hold.tenant_id = $2)
      and (cast($3 as text) is null or hold.resource_type = $3)
      and (cast($4 as text) is null or hold.resource_id = $4)
      and (cast($5 as text) is null or hold.error_code = $5)
      and (cast($6 as text) is null or hold.state = $6)
for update
