with reach as materialized (
    select least(
        coalesce((
            select attempt.attempt_id - 1 from "public".outbox_attempt as attempt
            where attempt.backend_id = $1 and attempt.attempt_id > $2
              and attempt.finished_at is null
            order by attempt.attempt_id
            limit 1
        ), (
            select attempt.attempt_id from "public".outbox_attempt as attempt
            where attempt.backend_id = $1 and attempt.attempt_id > $2
            order by attempt.attempt_id desc
            limit 1
        )), (
            select attempt.attempt_id from "public".outbox_attempt as attempt
            where attempt.backend_id = $1 and attempt.attempt_id > $2
            order by attempt.attempt_id
            offset $3 - 1 limit 1
        )
    ) as attempt_id
), total as (
    select sum(attempt.applied) as applied, sum(attempt.stale) as stale, sum(attempt.superseded) as superseded,
           sum(attempt.retried) as retried, sum(attempt.rejected) as rejected, sum(attempt.released) as released,
           sum(attempt.lost) as lost,
           max(attempt.finished_at) filter (where attempt.applied + attempt.stale > 0) as last_success_at,
           max(attempt.finished_at) filter (where attempt.error_code is not null) as last_error_at,
           (array_agg(attempt.error_code order by attempt.finished_at desc)
               filter (where attempt.error_code is not null))[1] as last_error_code
    from "public".outbox_attempt as attempt cross join reach
    where attempt.backend_id = $1 and attempt.attempt_id > $2
      and attempt.attempt_id <= reach.attempt_id
)
update "public".outbox_secondary as secondary
set folded_through = reach.attempt_id,
    applied = secondary.applied + total.applied, stale = secondary.stale + total.stale,
    superseded = secondary.superseded + total.superseded, retried = secondary.retried + total.retried,
    rejected = secondary.rejected + total.rejected, released = secondary.released + total.released,
    lost = secondary.lost + total.lost,
    last_success_at = greatest(secondary.last_success_at, total.last_success_at),
    last_error_at = greatest(secondary.last_error_at, total.last_error_at),
    last_error_code = coalesce(total.last_error_code, secondary.last_error_code)
from reach cross join total
where secondary.backend_id = $1 and reach.attempt_id > $2 and total.applied is not null
