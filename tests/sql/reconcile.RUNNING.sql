select cast(pg_snapshot_xip(pg_current_snapshot()) as text)
