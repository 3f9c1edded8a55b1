select current_setting('session_replication_role') as acting_as,
       array(
           select cast(cast(own.tgrelid as regclass) as text) || '.' || own.tgname
           from pg_trigger as own
           where not own.tgisinternal and own.tgenabled in ('D', 'R')
             and own.tgrelid in (
                 cast('"public".outbox' as regclass), cast('"public".outbox_delivery' as regclass),
                 cast('"public".outbox_attempt' as regclass), cast('"public".outbox_hold' as regclass),
                 cast('"public".outbox_secondary' as regclass))
           order by 1
       ) as disabled
