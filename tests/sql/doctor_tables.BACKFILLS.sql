select backend_id, count(*) as scopes, statement_timestamp() - max(advanced_at) as age
from "public".outbox_backfill
where finished_at is null
group by backend_id
order by backend_id
