select (
           select count(*) from "public".outbox_delivery as delivery
           where delivery.backend_id = $1 and delivery.event_id <= cast($2 as bigint)
       ) + (
           select count(*)
           from "public".outbox_attempt as attempt cross join lateral unnest(attempt.event_ids) as owed (event_id)
           where attempt.backend_id = $1 and attempt.finished_at is null
             and owed.event_id <= cast($2 as bigint)
       ) + count(*) filter (
           where hold.state in ('released', 'retrying')
             and (hold.event_ids <> '{}' or hold.next_attempt_at is not null)
       ) as coming,
       count(*) filter (where hold.state = 'dead') as dead
from "public".outbox_hold as hold
where hold.backend_id = $1 and hold.oldest_id <= cast($2 as bigint)
