select case when is_called then last_value else 0 end from "public".outbox_event_id_seq
