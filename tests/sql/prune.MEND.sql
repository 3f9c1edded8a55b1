with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.attempt_id > $2 and attempt.finished_at is null
), stray as materialized (
    select hold.ctid as row_id, hold.event_ids = '{}' and not exists (
               select from "public".outbox_hold as behind
               where behind.backend_id = $1 and behind.key_hash = hold.key_hash
                 and behind.tenant_id = hold.tenant_id and behind.resource_type = hold.resource_type
                 and behind.resource_id = hold.resource_id and behind.page > 0
               offset 0
           ) as owes_nothing
    from "public".outbox_hold as hold
    where hold.backend_id = $1 and hold.next_attempt_at is null and hold.state <> 'dead'
      and hold.key_hash not in (select key_hash from busy)
      and (hold.page = 0 or not exists (
          select from "public".outbox_hold as before
          where before.backend_id = $1 and before.key_hash = hold.key_hash
            and before.tenant_id = hold.tenant_id and before.resource_type = hold.resource_type
            and before.resource_id = hold.resource_id and before.page < hold.page
          offset 0
      ))
), gone as (
    delete from "public".outbox_hold where ctid = any (array(select row_id from stray where owes_nothing))
)
update "public".outbox_hold
set next_attempt_at = statement_timestamp(), page = 0, state = case when page > 0 then 'released' else state end
where ctid = any (array(select row_id from stray where not owes_nothing))
