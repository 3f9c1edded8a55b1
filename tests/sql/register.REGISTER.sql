insert into "public".outbox_secondary as secondary
    (backend_id, role, mode, ordering, tenant_ids, resource_types, status)
select given.backend_id, given.role, given.mode, given.ordering,
       cast(given.tenant_ids as text[]), cast(given.resource_types as text[]),
       case when given.shadow then 'shadow' else 'live' end
from unnest(
    cast($1 as text[]), cast($2 as text[]), cast($3 as text[]), cast($4 as text[]),
    cast($5 as text[]), cast($6 as text[]), cast($7 as boolean[])
) as given (backend_id, role, mode, ordering, tenant_ids, resource_types, shadow)
where not exists (
    select from "public".outbox_secondary as known
    where known.backend_id = given.backend_id
      and (known.role, known.mode, known.ordering) = (given.role, given.mode, given.ordering)
      and known.tenant_ids is not distinct from cast(given.tenant_ids as text[])
      and known.resource_types is not distinct from cast(given.resource_types as text[])
      and not (cast($8 as boolean) and known.status = 'removed')
)
on conflict (backend_id) do update
set role = excluded.role, mode = excluded.mode, ordering = excluded.ordering, tenant_ids = excluded.tenant_ids,
    resource_types = excluded.resource_types,
    status = case when cast($8 as boolean) and secondary.status = 'removed' then 'shadow'
                  else secondary.status end,
    registered_at = case when cast($8 as boolean) and secondary.status = 'removed' then excluded.registered_at
                         else secondary.registered_at end
