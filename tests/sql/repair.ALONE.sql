select pg_advisory_xact_lock(hashtextextended('"public".outbox repair', 0))
