with page as materialized (
    select event.event_id, cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from "public".outbox as event
    where event.event_id > $1 and event.created_at < statement_timestamp() - cast($2 as interval)
    order by event.event_id
    limit $3
), secondary as materialized (
    select backend_id, folded_through from "public".outbox_secondary
), owed as materialized (
    select page.event_id
    from page cross join secondary
    cross join lateral (
        select from "public".outbox_delivery as delivery
        where delivery.backend_id = secondary.backend_id and delivery.lane = page.lane
          and delivery.event_id = page.event_id
        offset 0
    ) as delivery
    union all
    select attempt.event_id
    from secondary
    cross join lateral (
        select unnest(attempt.event_ids) as event_id
        from "public".outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
          and attempt.finished_at is null
    ) as attempt
    union all
    select page.event_id
    from page cross join secondary
    cross join lateral (
        select from "public".outbox_hold as hold
        where hold.backend_id = secondary.backend_id and hold.key_hash = page.key_hash
          and page.event_id = any (hold.event_ids)
        offset 0
    ) as hold
), gone as (
    delete from "public".outbox where event_id = any (
        array(select event_id from page where event_id not in (select event_id from owed))
    )
)
select max(event_id) from page
