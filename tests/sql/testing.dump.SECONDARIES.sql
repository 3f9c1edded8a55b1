select backend_id, ordering, status, folded_through, applied, stale, superseded, retried, rejected, released, lost,
       discarded
from "public".outbox_secondary
order by backend_id
