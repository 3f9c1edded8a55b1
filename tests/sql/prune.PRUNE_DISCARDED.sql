with page as materialized (
    select discarded.ctid as row_id, discarded.discarded_at, discarded.oldest_id, discarded.event_id
    from "public".outbox_discarded as discarded
    where discarded.discarded_at > coalesce(cast($1 as timestamptz), timestamptz '-infinity')
      and discarded.discarded_at < statement_timestamp() - cast($2 as interval)
    order by discarded.discarded_at
    -- What was given up at once is looked at together, since the next page begins after its time.
    fetch first ($3) rows with ties
), gone as (
    delete from "public".outbox_discarded where ctid = any (array(
        select page.row_id from page where not exists (
            select from "public".outbox as event
            where event.event_id between page.oldest_id and page.event_id
            offset 0
        )
    ))
)
select case when count(*) >= $3 then max(discarded_at) end from page
