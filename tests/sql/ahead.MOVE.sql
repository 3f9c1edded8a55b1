with given as materialized (
    select case when is_called then last_value else 0 end as highest from "public".outbox_event_id_seq
), reached as materialized (
    select greatest(
        cast($1 as bigint),
        (select max(event_id) from "public".outbox),
        (select max(event_id) from "public".outbox_delivery)
    ) as highest
)
select given.highest as before,
       case when reached.highest > given.highest
            then setval('"public".outbox_event_id_seq', reached.highest)
            else given.highest end as after
from given cross join reached
