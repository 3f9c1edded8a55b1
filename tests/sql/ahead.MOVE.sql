with given as materialized (
    select case when is_called then last_value else 0 end as highest from "public".outbox_event_id_seq
), reached as materialized (
    select greatest(
        cast($1 as bigint),
        (select highest from given),
        (select max(event_id) from "public".outbox),
        (select max(event_id) from "public".outbox_delivery)
    ) as highest
), owed as materialized (
    select (select count(*) from "public".outbox_delivery where backend_id = any (cast($2 as text[])))
         + (select coalesce(sum(cardinality(event_ids)), 0) from "public".outbox_attempt
            where backend_id = any (cast($2 as text[])) and finished_at is null)
         + (select coalesce(sum(cardinality(event_ids)), 0) from "public".outbox_hold
            where backend_id = any (cast($2 as text[]))) as events
)
select reached.highest as through,
       case when reached.highest + owed.events > given.highest
            then setval('"public".outbox_event_id_seq', cast(reached.highest + owed.events as bigint))
            else given.highest end as after
from given cross join reached cross join owed
