select coalesce(max(beyond), 0) from "public".outbox_secondary
