select exists (select from "public".outbox_secondary) as anybody
