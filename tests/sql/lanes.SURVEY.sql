select lane.lane, lowest.event_id
from unnest(cast($1 as smallint[]), cast($2 as bigint[])) as lane (lane, floor)
left join lateral (
    select delivery.event_id
    from "public".outbox_delivery as delivery
    where delivery.backend_id = $3 and delivery.lane = lane.lane and delivery.event_id > lane.floor
    order by delivery.event_id
    limit 1
) as lowest on true
where cast(cast(pg_snapshot_xmin(pg_current_snapshot()) as text) as bigint) >= $4
