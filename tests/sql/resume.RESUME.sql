with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.attempt_id > $2 and attempt.finished_at is null
), due as materialized (
    select hold.tenant_id, hold.resource_type, hold.resource_id, true as is_due
    from "public".outbox_hold as hold
    where hold.backend_id = $1 and hold.next_attempt_at <= statement_timestamp()
      and hold.alone = cast($3 as boolean) and hold.key_hash not in (select key_hash from busy)
    order by hold.next_attempt_at
    limit cast($4 as integer)
    for update skip locked
), fresh as materialized (
    select delivery.row_id, delivery.lane, delivery.event_id, delivery.key_hash
    from unnest(cast($5 as smallint[]), cast($6 as bigint[]), cast($7 as integer[]))
        as lane (lane, floor, share)
    cross join lateral (
        select delivery.ctid as row_id, delivery.lane, delivery.event_id, delivery.key_hash
        from "public".outbox_delivery as delivery
        where delivery.backend_id = $1 and delivery.lane = lane.lane and delivery.event_id > lane.floor
          and delivery.key_hash not in (select key_hash from busy)
        order by delivery.event_id
        limit lane.share
        for update skip locked
    ) as delivery
    limit (select greatest(cast($4 as integer) - count(*), 0) from due)
), absorbed as materialized (
    select event.tenant_id, event.resource_type, event.resource_id,
           array_agg(event.event_id order by event.event_id) as event_ids
    from fresh
    join "public".outbox_hold as hold on hold.backend_id = $1 and hold.key_hash = fresh.key_hash
    join "public".outbox as event on event.event_id = fresh.event_id and event.tenant_id = hold.tenant_id
     and event.resource_type = hold.resource_type and event.resource_id = hold.resource_id
    group by event.tenant_id, event.resource_type, event.resource_id
), touched as materialized (
    select hold.tenant_id, hold.resource_type, hold.resource_id, hold.key_hash, hold.attempts, hold.lost,
           hold.first_failed_at,
           hold.event_ids || coalesce(found.event_ids, '{}') as event_ids,
           hold.state = 'dead' and not cast($8 as boolean) as revived,
           found.is_due is not null or (hold.state = 'dead' and not cast($8 as boolean)) as taken
    from (
        select tenant_id, resource_type, resource_id, due.is_due, absorbed.event_ids
        from due full join absorbed using (tenant_id, resource_type, resource_id)
    ) as found
    join "public".outbox_hold as hold on hold.backend_id = $1 and hold.tenant_id = found.tenant_id
     and hold.resource_type = found.resource_type and hold.resource_id = found.resource_id
), kept as (
    update "public".outbox_hold as hold
    set event_ids = case
            when cast($8 as boolean) and touched.taken
                then touched.event_ids[cast($4 as integer) + 1 :]
            when cast($8 as boolean) then touched.event_ids
            when touched.taken then '{}'
            else touched.event_ids[cardinality(touched.event_ids) :] end,
        state = case when touched.revived then 'released' else hold.state end,
        attempts = case when touched.revived then 0 else hold.attempts end,
        lost = case when touched.revived then 0 else hold.lost end,
        first_failed_at = case when touched.revived then null else hold.first_failed_at end,
        next_attempt_at = case when not touched.taken then hold.next_attempt_at end
    from touched
    where hold.backend_id = $1 and hold.tenant_id = touched.tenant_id
      and hold.resource_type = touched.resource_type and hold.resource_id = touched.resource_id
), superseded as materialized (
    select coalesce(sum(cardinality(event_ids) - 1), 0) as deliveries
    from touched where not taken and not cast($8 as boolean)
), picked as materialized (
    select unnest(
               case when cast($8 as boolean) then event_ids[: cast($4 as integer)] else event_ids end
           ) as event_id,
           key_hash, null as lane,
           case when revived then 0 else attempts end as attempts,
           case when revived then 0 else lost end as lost,
           case when revived then null else first_failed_at end as first_failed_at
    from touched where taken
    union all
    select event_id, key_hash, lane, null, null, null
    from fresh where event_id not in (select unnest(event_ids) from absorbed)
), gone as (
    delete from "public".outbox_delivery as delivery using fresh where delivery.ctid = fresh.row_id
), opened as (
    insert into "public".outbox_attempt
        (backend_id, relay_id, event_ids, key_hashes, lease_until, finished_at, superseded)
    select $1, cast($9 as uuid),
           coalesce(array_agg(event_id order by event_id), '{}'), coalesce(array_agg(distinct key_hash), '{}'),
           clock_timestamp() + cast($10 as interval), case when count(*) = 0 then clock_timestamp() end,
           (select deliveries from superseded)
    from picked
    having count(*) > 0 or (select deliveries from superseded) > 0
    returning attempt_id
)
select opened.attempt_id, picked.lane, picked.attempts, picked.lost,
       statement_timestamp() - picked.first_failed_at as failing_for,
       event.tenant_id, event.resource_type, event.resource_id, event.operation,
       cast(event.content as text) as content, event.version,
       event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at
from opened cross join picked
left join "public".outbox as event on event.event_id = picked.event_id
order by event.event_id
