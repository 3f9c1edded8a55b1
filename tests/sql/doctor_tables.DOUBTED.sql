select secondary.backend_id, secondary.epoch,
       secondary.doubted_at is not null and not exists (
           select from "public".outbox_reconciliation as run
           where run.backend_id = secondary.backend_id and run.tenant_id is null and run.resource_type is null
             and run.started_at > secondary.doubted_at
             and run.missing + run.extra + run.stale + run.altered <= run.repaired
       ) as doubted
from "public".outbox_secondary as secondary
where secondary.status <> 'removed'
order by secondary.backend_id
