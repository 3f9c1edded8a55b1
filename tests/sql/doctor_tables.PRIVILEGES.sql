select needed.work,
       array_agg(needed.privilege || ' on ' || needed.name order by needed.name, needed.privilege) as missing
from (values
    ('claim', 'outbox', 'select'), ('claim', 'outbox_delivery', 'select'), ('claim', 'outbox_delivery', 'delete'),
    ('claim', 'outbox_attempt', 'select'), ('claim', 'outbox_attempt', 'insert'), ('claim', 'outbox_hold', 'select'),
    ('claim', 'outbox_secondary', 'select'), ('claim', 'outbox_secondary', 'update'),
    ('settle', 'outbox_attempt', 'update'), ('settle', 'outbox_hold', 'insert'), ('settle', 'outbox_hold', 'update'),
    ('settle', 'outbox_hold', 'delete'),
    ('prune', 'outbox', 'delete'), ('prune', 'outbox_attempt', 'delete'), ('prune', 'outbox_discarded', 'delete')
) as needed (work, name, privilege)
where not has_table_privilege('"public".' || needed.name, needed.privilege)
group by needed.work
order by needed.work
