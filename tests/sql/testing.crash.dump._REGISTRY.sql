select * from "public".outbox_secondary
