select * from "public".outbox_discarded
