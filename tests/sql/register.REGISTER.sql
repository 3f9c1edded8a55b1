insert into "public".outbox_secondary as secondary (backend_id, role, ordering, tenant_ids, resource_types)
select given.backend_id, given.role, given.ordering,
       cast(given.tenant_ids as text[]), cast(given.resource_types as text[])
from unnest(
    cast($1 as text[]), cast($2 as text[]), cast($3 as text[]),
    cast($4 as text[]), cast($5 as text[])
) as given (backend_id, role, ordering, tenant_ids, resource_types)
on conflict (backend_id) do update
set role = excluded.role, ordering = excluded.ordering, tenant_ids = excluded.tenant_ids,
    resource_types = excluded.resource_types
where (secondary.role, secondary.ordering, secondary.tenant_ids, secondary.resource_types)
    is distinct from (excluded.role, excluded.ordering, excluded.tenant_ids, excluded.resource_types)
