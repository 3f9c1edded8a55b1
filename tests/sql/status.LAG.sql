select lag.backend_id, lag.status, lag.pending, lag.in_flight, lag.failing, lag.dead,
       coalesce(lag.lag, interval '0') as lag, lag.breaker, lag.last_success_at, lag.last_error_at, lag.last_error_code,
       lag.applied, lag.stale, lag.superseded, lag.retried, lag.rejected, lag.lost, lag.discarded,
       lag.looked_at, lag.silence,
       latest.throughput, lag.beyond,
       secondary.doubted_at is not null and (proof.started_at > secondary.doubted_at) is not true as doubted,
       latest.endings,
       proof.finished_at, proof.primary_count, proof.missing, proof.extra, proof.stale, proof.altered, proof.in_flight,
       proof.repaired
from "public".outbox_lag as lag
join "public".outbox_secondary as secondary on secondary.backend_id = lag.backend_id
cross join lateral (
    select cast(
               coalesce(sum(applied + stale + superseded) filter (where age < interval '1 minute'), 0)
               / case when count(*) < 100 or max(age) >= interval '1 minute' then 60
                      else greatest(extract(epoch from max(age)), 0.01) end
           as double precision) as throughput,
           coalesce(array_agg(
               case when applied + stale = 0 then coalesce(error_code, 'unknown') end order by attempt_id desc
           ) filter (
               where finished_at is not null
                 and (applied + stale + retried + rejected + lost > 0 or error_code is not null)
           ), '{}') as endings
    from (
        select attempt.*, statement_timestamp() - attempt.finished_at as age
        from "public".outbox_attempt as attempt
        where attempt.backend_id = lag.backend_id
        order by attempt.attempt_id desc
        limit 100
    ) as attempt
) as latest
left join lateral (
    select * from "public".outbox_reconciliation as proof
    where proof.backend_id = lag.backend_id and proof.tenant_id is null and proof.resource_type is null
    -- By their numbers: by a clock that was ahead, one that ended earlier would seem to be the latest.
    order by proof.run_id desc
    limit 1
) as proof on true
order by lag.backend_id
