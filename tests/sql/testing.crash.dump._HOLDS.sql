select * from "public".outbox_hold
