with mine as materialized (
    select event.event_id, cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from "public".outbox as event
    where event.tenant_id = $1 and event.resource_type = $2 and event.resource_id = $3
      and event.event_id < cast($4 as bigint)
      and (event.headers is not null or cast(event.content as text) <> '{}')
), owed as materialized (
    select mine.event_id
    from mine cross join "public".outbox_secondary as secondary
    cross join lateral (
        select from "public".outbox_delivery as delivery
        where delivery.backend_id = secondary.backend_id and delivery.lane = mine.lane
          and delivery.event_id = mine.event_id
        offset 0
    ) as delivery
    union
    select unnest(attempt.event_ids) from "public".outbox_attempt as attempt where attempt.finished_at is null
    union
    select mine.event_id
    from mine cross join "public".outbox_secondary as secondary
    cross join lateral (
        select from "public".outbox_hold as hold
        where hold.backend_id = secondary.backend_id and hold.key_hash = mine.key_hash
          and mine.event_id = any (hold.event_ids)
        offset 0
    ) as hold
), scrubbed as (
    update "public".outbox as event
    set operation = case when event.event_id in (select event_id from owed) then 'delete' else event.operation end,
        content = case when event.operation <> 'delete' and event.event_id not in (select event_id from owed)
                       then cast('{}' as json) end,
        headers = null
    where event.event_id = any (array(select event_id from mine))
    returning event.event_id
)
select count(*) from scrubbed
