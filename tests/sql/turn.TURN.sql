select secondary.status, secondary.ordering, secondary.breaker, secondary.breaker_failures, secondary.breaker_ramp,
       cast(coalesce(extract(epoch from secondary.breaker_until - statement_timestamp()), 0) as double precision)
           as breaker_wait,
       secondary.folded_through,
       exists (
           select from "public".outbox_attempt as attempt
           where attempt.backend_id = $1 and attempt.attempt_id > secondary.folded_through
             and attempt.finished_at is null and attempt.lease_until < statement_timestamp()
       ) as lost_attempts,
       exists (
           select from "public".outbox_attempt as attempt
           where attempt.backend_id = $1 and attempt.attempt_id > secondary.folded_through
             and attempt.finished_at is null
       ) as open_attempts,
       exists (
           select from "public".outbox_hold as hold where hold.backend_id = $1
       ) as holds,
       -- Ordered, so that only the index of what is due can serve it.
       coalesce((
           select true from "public".outbox_hold as hold
           where hold.backend_id = $1 and hold.alone and hold.next_attempt_at <= statement_timestamp()
           order by hold.next_attempt_at
           limit 1
       ), false) as suspects,
       greatest(secondary.looked_at - statement_timestamp(), interval '0') as ahead,
       secondary.beyond is not null as beyond
from "public".outbox_secondary as secondary
where secondary.backend_id = $1
for no key update of secondary skip locked
