insert into "public".outbox_backfill as known (backend_id, tenant_id, resource_type, total)
select cast($1 as text), given.tenant_id, given.resource_type, given.total
from unnest(cast($2 as text[]), cast($3 as text[]), cast($4 as bigint[]))
    as given (tenant_id, resource_type, total)
order by given.tenant_id, given.resource_type
on conflict (backend_id, tenant_id, resource_type) do update
set after = null, recorded = 0, refused = 0, total = excluded.total, started_at = clock_timestamp(),
    advanced_at = clock_timestamp(), finished_at = null
where cast($5 as boolean)
