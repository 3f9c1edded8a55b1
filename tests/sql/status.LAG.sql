select backend_id, status, pending, in_flight, failing, dead, coalesce(lag, interval '0') as lag, breaker,
       last_success_at, last_error_at, last_error_code, applied, stale, superseded, retried, rejected, lost
from "public".outbox_lag
order by backend_id
