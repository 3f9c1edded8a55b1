delete from "public".outbox_reconciliation as old
where old.finished_at < statement_timestamp() - cast($1 as interval) and old.repaired = 0
  and (old.tenant_id is not null or old.resource_type is not null or exists (
      select from "public".outbox_reconciliation as newer
      where newer.backend_id = old.backend_id and newer.tenant_id is null and newer.resource_type is null
        and newer.finished_at > old.finished_at
  ))
