with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.attempt_id > $2 and attempt.finished_at is null
), held as materialized (
    select exists (select from "public".outbox_hold as hold where hold.backend_id = $1) as any_hold
), fresh as materialized (
    select delivery.row_id, delivery.lane, delivery.event_id, delivery.key_hash
    from unnest(cast($3 as smallint[]), cast($4 as bigint[]), cast($5 as integer[]))
        as lane (lane, floor, share)
    cross join lateral (
        select delivery.ctid as row_id, delivery.lane, delivery.event_id, delivery.key_hash
        from "public".outbox_delivery as delivery
        where delivery.backend_id = $1 and delivery.lane = lane.lane and delivery.event_id > lane.floor
          and delivery.key_hash not in (select key_hash from busy)
          -- Asked once, as nearly always there is no hold at all; else a probe per row, as the plan of a join would
          -- hang on how many holds there once were.
          and (not (select any_hold from held) or not exists (
              select from "public".outbox_hold as hold
              where hold.backend_id = $1 and hold.key_hash = delivery.key_hash
              offset 0
          ))
        order by delivery.event_id
        limit lane.share
        for update of delivery skip locked
    ) as delivery
    limit cast($6 as integer) * cast($7 as integer)
), gone as (
    delete from "public".outbox_delivery where ctid = any (array(select row_id from fresh))
), sliced as (
    select event_id, key_hash, (rank() over (order by key_hash) - 1) / cast($6 as integer) as slice
    from fresh
), opened as (
    insert into "public".outbox_attempt (backend_id, relay_id, event_ids, key_hashes, lease_until)
    select $1, cast($8 as uuid), array_agg(event_id), array_agg(key_hash),
           clock_timestamp() + cast($9 as interval)
    from sliced
    group by slice
    returning attempt_id
)
select (select attempt_id from opened) as attempt_id, fresh.lane, event.tenant_id, event.resource_type, event.resource_id, event.operation,
       case when event.content_bytes <= cast($10 as bigint) / (select count(*) from fresh) then cast(event.content as text) end as content,
       event.version, event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at,
       case when event.content_bytes > cast($10 as bigint) / (select count(*) from fresh) then event.content_bytes end as left_out
from fresh left join lateral (
    select * from "public".outbox as event where event.event_id = fresh.event_id offset 0
) as event on true
