with page as materialized (
    select event.event_id, cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane
    from "public".outbox as event
    where event.event_id > $1 and event.created_at < statement_timestamp() - cast($2 as interval)
    order by event.event_id
    limit $3
), owed as materialized (
    select page.event_id
    from page
    cross join "public".outbox_secondary as secondary
    join "public".outbox_delivery as delivery on delivery.backend_id = secondary.backend_id
     and delivery.lane = page.lane and delivery.event_id = page.event_id
    union all
    select unnest(attempt.event_ids)
    from "public".outbox_secondary as secondary
    join "public".outbox_attempt as attempt
      on attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
    where attempt.finished_at is null
    union all
    select unnest(hold.event_ids) from "public".outbox_hold as hold
), gone as (
    delete from "public".outbox as event
    using page
    where event.event_id = page.event_id and page.event_id not in (select event_id from owed)
)
select max(event_id) from page
