delete from "public".outbox_discarded as discarded
where discarded.discarded_at < statement_timestamp() - cast($1 as interval)
  and not exists (
      select from "public".outbox as event
      where event.event_id between discarded.oldest_id and discarded.event_id
      offset 0
  )
