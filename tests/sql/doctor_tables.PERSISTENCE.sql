select relation.relname
from pg_class as relation
where relation.relnamespace = (select relnamespace from pg_class where oid = cast('"public".outbox' as regclass))
  and relation.relkind = 'r' and relation.relpersistence <> 'p'
  and relation.relname in (
      'outbox', 'outbox_delivery', 'outbox_attempt', 'outbox_hold', 'outbox_discarded', 'outbox_secondary',
      'outbox_backfill', 'outbox_reconciliation')
order by relation.relname
