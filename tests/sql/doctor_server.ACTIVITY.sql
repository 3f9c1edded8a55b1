select coalesce(max(statement_timestamp() - xact_start), interval '0') as age,
       (array_agg(datname order by xact_start))[1] as database,
       pg_has_role(current_user, 'pg_read_all_stats', 'usage') as sees_all
from pg_stat_activity
where backend_type = 'client backend' and pid <> pg_backend_pid() and xact_start is not null
