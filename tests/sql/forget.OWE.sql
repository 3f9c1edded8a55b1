insert into "public".outbox_delivery (backend_id, lane, event_id, key_hash)
select secondary.backend_id, cast(hashtextextended(cast($1 as text), 0) & 63 as smallint),
       cast($2 as bigint),
       hashtextextended(
           cast($1 as text) || '/' || cast($3 as text) || '/' || cast($4 as text), 0
       )
from "public".outbox_secondary as secondary
where secondary.status in ('shadow', 'live', 'paused')
on conflict (backend_id, lane, event_id) do nothing
