with page as materialized (
    select attempt.row_id
    from "public".outbox_secondary as secondary
    cross join lateral (
        select attempt.ctid as row_id
        from "public".outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.attempt_id <= secondary.folded_through
          and attempt.finished_at < statement_timestamp() - cast($1 as interval)
        order by attempt.attempt_id
        limit $2
    ) as attempt
)
delete from "public".outbox_attempt where ctid = any (array(select row_id from page))
