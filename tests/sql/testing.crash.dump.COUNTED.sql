select lag.backend_id, lag.pending, (
    select count(distinct owed.event_id) from (
        select delivery.event_id from "public".outbox_delivery as delivery
        where delivery.backend_id = lag.backend_id
        union all
        select unnest(hold.event_ids) from "public".outbox_hold as hold
        where hold.backend_id = lag.backend_id
        union all
        select unnest(attempt.event_ids) from "public".outbox_attempt as attempt
        where attempt.backend_id = lag.backend_id and attempt.finished_at is null
    ) as owed
) as there
from "public".outbox_lag as lag
where lag.status <> 'removed'
