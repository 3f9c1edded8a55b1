with closed as (
    update "public".outbox_attempt as attempt
    set finished_at = clock_timestamp(), applied = $1, stale = $2,
        superseded = attempt.superseded + cast($3 as integer), retried = $4, rejected = $5,
        released = $6, lost = $7, error_code = $8
    where attempt.backend_id = $9 and attempt.attempt_id = $10 and attempt.finished_at is null
      and (attempt.relay_id = cast($11 as uuid)
           or cast($12 as boolean) and attempt.lease_until < statement_timestamp())
    returning attempt.attempt_id
), done as materialized (
    select hold.row_id, hold.next_id
    from closed cross join unnest(
        cast($13 as text[]), cast($14 as text[]), cast($15 as text[])
    ) as key (tenant_id, resource_type, resource_id)
    cross join lateral (
        select hold.ctid as row_id, coalesce(hold.event_ids[1], (
            select behind.oldest_id
            from "public".outbox_hold as behind
            where behind.backend_id = $9 and behind.key_hash = hold.key_hash
              and behind.tenant_id = hold.tenant_id and behind.resource_type = hold.resource_type
              and behind.resource_id = hold.resource_id and behind.page > 0
            order by behind.page
            limit 1
        )) as next_id
        from "public".outbox_hold as hold
        where hold.backend_id = $9
          and hold.key_hash = hashtextextended(key.tenant_id || '/' || key.resource_type || '/' || key.resource_id, 0)
          and hold.tenant_id = key.tenant_id
          and hold.resource_type = key.resource_type and hold.resource_id = key.resource_id and hold.page = 0
        offset 0
    ) as hold
), resolved as (
    delete from "public".outbox_hold where ctid = any (array(select row_id from done where next_id is null))
), eased as (
    update "public".outbox_hold
    set state = 'released', attempts = 0, lost = 0, alone = false, next_attempt_at = statement_timestamp(),
        oldest_id = (select next_id from done where row_id = outbox_hold.ctid)
    where ctid = any (array(select row_id from done where next_id is not null))
), held as (
    insert into "public".outbox_hold as hold
        (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id, owed_since, state, attempts,
         lost, alone, first_failed_at, last_failed_at, next_attempt_at, error_code, error)
    select $9, kept.tenant_id, kept.resource_type, kept.resource_id,
           hashtextextended(kept.tenant_id || '/' || kept.resource_type || '/' || kept.resource_id, 0),
           cast(kept.event_ids as bigint[]), kept.oldest_id, kept.owed_since, kept.state, kept.attempts, kept.lost,
           kept.alone,
           case when kept.anew then statement_timestamp() end,
           case when kept.error_code is not null then statement_timestamp() end,
           statement_timestamp() + make_interval(secs => kept.delay), kept.error_code, kept.error
    from closed cross join unnest(
        cast($16 as text[]), cast($17 as text[]), cast($18 as text[]),
        cast($19 as text[]), cast($20 as bigint[]), cast($21 as timestamptz[]),
        cast($22 as text[]),
        cast($23 as integer[]), cast($24 as integer[]), cast($25 as boolean[]), cast($26 as boolean[]),
        cast($27 as double precision[]), cast($28 as text[]), cast($29 as text[])
    ) as kept (tenant_id, resource_type, resource_id, event_ids, oldest_id, owed_since, state, attempts, lost, alone,
               anew, delay, error_code, error)
    on conflict (backend_id, key_hash, tenant_id, resource_type, resource_id, page) do update
    set event_ids = excluded.event_ids || hold.event_ids, oldest_id = excluded.oldest_id,
        owed_since = excluded.owed_since, state = excluded.state, attempts = excluded.attempts, lost = excluded.lost,
        alone = excluded.alone, next_attempt_at = excluded.next_attempt_at,
        first_failed_at = coalesce(excluded.first_failed_at, case when excluded.state <> 'released'
                                                                  then hold.first_failed_at end),
        last_failed_at = coalesce(excluded.last_failed_at, hold.last_failed_at),
        error_code = coalesce(excluded.error_code, hold.error_code),
        error = coalesce(excluded.error, hold.error)
)
select attempt_id from closed
