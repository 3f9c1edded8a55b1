select slot_name from pg_replication_slots where not active and (restart_lsn is not null or xmin is not null)
order by slot_name
