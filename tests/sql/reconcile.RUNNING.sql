select transaction_id
from (select cast(pg_snapshot_xip(pg_current_snapshot()) as text) as transaction_id) as running
where cast(transaction_id as bigint) < cast($1 as bigint)
