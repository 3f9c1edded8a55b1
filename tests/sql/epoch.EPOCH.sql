select concat_ws('/',
           (select system_identifier from pg_control_system()),
           left(pg_walfile_name(pg_current_wal_insert_lsn()), 8),
           (select oid from pg_database where datname = current_database()),
           cast(cast('"public".outbox' as regclass) as oid)) as epoch
