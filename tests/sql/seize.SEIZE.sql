with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.attempt_id > $2 and attempt.finished_at is null
), asked as materialized (
    select event.event_id, cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from unnest(cast($3 as bigint[])) as wanted (event_id)
    cross join lateral (
        select * from "public".outbox as event where event.event_id = wanted.event_id offset 0
    ) as event
), mine as materialized (
    select asked.lane, asked.key_hash, max(asked.event_id) as last_id
    from asked
    cross join lateral (
        select from "public".outbox_delivery as delivery
        where delivery.backend_id = $1 and delivery.lane = asked.lane and delivery.event_id = asked.event_id
        offset 0
    ) as delivery
    group by asked.lane, asked.key_hash
), ahead as materialized (
    select lane.lane, delivery.row_id, delivery.event_id, delivery.key_hash
    from (select lane, max(last_id) as last_id from mine group by lane) as lane
    cross join lateral (
        select delivery.ctid as row_id, delivery.event_id, delivery.key_hash
        from "public".outbox_delivery as delivery
        where delivery.backend_id = $1 and delivery.lane = lane.lane and delivery.event_id <= lane.last_id
          and delivery.event_id > (cast($4 as bigint[]))[lane.lane + 1]
        order by delivery.event_id
        limit cast($5 as integer)
    ) as delivery
), fresh as materialized (
    select ahead.row_id
    from ahead join mine on mine.lane = ahead.lane and mine.key_hash = ahead.key_hash and mine.last_id >= ahead.event_id
    where ahead.key_hash not in (select key_hash from busy)
      and not exists (
          select from "public".outbox_hold as hold
          where hold.backend_id = $1 and hold.key_hash = ahead.key_hash
          offset 0
      )
    order by ahead.event_id
    limit cast($5 as integer)
), gone as (
    delete from "public".outbox_delivery where ctid = any (array(select row_id from fresh))
    returning event_id, key_hash
), opened as (
    insert into "public".outbox_attempt (backend_id, relay_id, event_ids, key_hashes, lease_until)
    select $1, cast($6 as uuid), array_agg(event_id), array_agg(key_hash),
           clock_timestamp() + cast($7 as interval)
    from gone
    having count(*) > 0
    returning attempt_id
)
select attempt_id from opened
