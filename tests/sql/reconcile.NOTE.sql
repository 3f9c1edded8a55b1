insert into "public".outbox_reconciliation
    (backend_id, tenant_id, resource_type, repair, actor, reason, high_water, primary_count, secondary_count, missing,
     extra, stale, altered, in_flight, repaired, refused, started_at)
values
    ($1, $2, $3, $4, $5, $6, $7, $8, $9,
     $10, $11, $12, $13, $14, $15, $16, $17)
