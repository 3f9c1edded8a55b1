update "public".outbox_backfill
set after = cast($1 as text), recorded = recorded + cast($2 as bigint),
    refused = refused + cast($3 as bigint), advanced_at = clock_timestamp(),
    finished_at = case when cast($4 as boolean) then clock_timestamp() end
where backend_id = $5 and tenant_id = $6 and resource_type = $7
