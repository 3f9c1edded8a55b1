with here as materialized (
    select oid from pg_catalog.pg_database where datname = current_database()
)
select distinct holder.name, holder.pid
from (
    select lock.virtualtransaction as name, lock.pid
    from pg_catalog.pg_locks as lock
    where lock.locktype = 'relation' and lock.mode = 'RowExclusiveLock' and lock.granted
      and lock.database = (select oid from here) and lock.relation = cast('"public".outbox' as regclass)
    union all
    select lock.virtualtransaction || ' ' || cast(activity.backend_xmin as text), activity.pid
    from pg_catalog.pg_stat_activity as activity
    join pg_catalog.pg_locks as lock
      on lock.pid = activity.pid and lock.locktype = 'virtualxid' and lock.mode = 'ExclusiveLock' and lock.granted
    where activity.datid = (select oid from here) and activity.backend_xmin is not null
      and coalesce(activity.backend_type, 'client backend') = 'client backend'
) as holder
where holder.pid is distinct from pg_backend_pid()
