select cast(cast(pg_snapshot_xmax(pg_current_snapshot()) as text) as bigint)
