select case when held.pid is null then 'prepared' else held.virtualtransaction end as writer
from pg_locks as held
where held.locktype = 'relation' and held.mode = 'RowExclusiveLock' and held.granted
  and held.database = (select oid from pg_database where datname = current_database())
  and held.relation = to_regclass('"public".outbox')
  and held.pid is distinct from pg_backend_pid()
