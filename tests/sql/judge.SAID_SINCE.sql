with kept as materialized (
    select event.resource_id, event.event_id, md5(cast(event.content as text)) as said,
           first_value(md5(cast(event.content as text)))
               over (partition by event.resource_id order by event.event_id desc) as newest
    from "public".outbox as event
    where event.tenant_id = $1 and event.resource_type = $2
      and event.resource_id = any (cast($3 as text[]))
), judged as (
    select kept.resource_id, kept.event_id,
           max(kept.event_id) filter (where kept.said is distinct from kept.newest)
               over (partition by kept.resource_id) as otherwise
    from kept
)
select judged.resource_id, min(judged.event_id) as position
from judged
where judged.event_id > coalesce(judged.otherwise, 0)
group by judged.resource_id
