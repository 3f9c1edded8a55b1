select pg_xact_status(cast(cast($1 as text) as xid8))
