alter sequence "public".outbox_event_id_seq increment by 1
