select current_setting('autovacuum') = 'on' and current_setting('track_counts') = 'on' as on_for_all,
       array_agg(relation.relname order by relation.relname) filter (where exists (
           select from unnest(relation.reloptions) as option (setting)
           where option.setting in ('autovacuum_enabled=false', 'autovacuum_enabled=off', 'autovacuum_enabled=0')
       )) as switched_off,
       max(coalesce(pg_stat_get_dead_tuples(relation.oid), 0)) as dead,
       (array_agg(relation.relname order by pg_stat_get_dead_tuples(relation.oid) desc))[1] as dirtiest
from pg_class as relation
where relation.oid in (
    cast('"public".outbox' as regclass), cast('"public".outbox_delivery' as regclass),
    cast('"public".outbox_attempt' as regclass), cast('"public".outbox_hold' as regclass),
    cast('"public".outbox_secondary' as regclass))
