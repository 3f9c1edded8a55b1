select (select case when is_called then last_value else 0 end from "public".outbox_event_id_seq) as given,
       greatest(
           (select max(event_id) from "public".outbox), (select max(event_id) from "public".outbox_delivery), 0
       ) as highest,
       (
           select seqcache from pg_sequence where seqrelid = cast('"public".outbox_event_id_seq' as regclass)
       ) as in_advance,
       (select case when is_called then last_value else 0 end from "public".outbox_attempt_attempt_id_seq) as opened,
       (
           select coalesce(max(greatest(secondary.folded_through, (
               select max(attempt.attempt_id) from "public".outbox_attempt as attempt
               where attempt.backend_id = secondary.backend_id
           ))), 0)
           from "public".outbox_secondary as secondary
       ) as counted
