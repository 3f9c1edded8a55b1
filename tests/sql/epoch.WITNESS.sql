with current as materialized (
select concat_ws('/',
           (select system_identifier from pg_control_system()),
           left(pg_walfile_name(pg_current_wal_insert_lsn()), 8),
           (select oid from pg_database where datname = current_database()),
           cast(cast('"public".outbox' as regclass) as oid)) as epoch
), noted as (
    update "public".outbox_secondary as secondary
    set epoch = current.epoch,
        doubted_at = case when secondary.epoch is null then secondary.doubted_at else statement_timestamp() end
    from current
    where secondary.backend_id = $1 and secondary.epoch is distinct from current.epoch
    returning secondary.doubted_at is not distinct from statement_timestamp() as doubted
)
select current.epoch,
       (select case when is_called then last_value else 0 end from "public".outbox_event_id_seq) as highest,
       coalesce((select max(event_id) from "public".outbox), 0) as committed,
       coalesce((select doubted from noted), false) as doubted
from current
