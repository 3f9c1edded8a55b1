insert into "public".outbox_secondary as secondary (backend_id, role, mode, ordering, tenant_ids, resource_types)
select given.backend_id, given.role, given.mode, given.ordering,
       cast(given.tenant_ids as text[]), cast(given.resource_types as text[])
from unnest(
    cast($1 as text[]), cast($2 as text[]), cast($3 as text[]), cast($4 as text[]),
    cast($5 as text[]), cast($6 as text[])
) as given (backend_id, role, mode, ordering, tenant_ids, resource_types)
where not exists (
    select from "public".outbox_secondary as known
    where known.backend_id = given.backend_id
      and (known.role, known.mode, known.ordering) = (given.role, given.mode, given.ordering)
      and known.tenant_ids is not distinct from cast(given.tenant_ids as text[])
      and known.resource_types is not distinct from cast(given.resource_types as text[])
)
on conflict (backend_id) do update
set role = excluded.role, mode = excluded.mode, ordering = excluded.ordering, tenant_ids = excluded.tenant_ids,
    resource_types = excluded.resource_types
