select (select count(*) from "public".outbox_delivery)
     + (select count(*) from "public".outbox_attempt where finished_at is null)
     + (select count(*) from "public".outbox_hold where state in ('released', 'retrying'))
