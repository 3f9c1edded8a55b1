"""Epoch: which history of the primary this is, and what says that it may have gone back.

A restore, a clone or a failover takes the primary to an earlier moment while the secondaries stay where they were. From
inside it looks like any other moment, but for what the dump, the base backup or the promotion could not bring along:
the cluster's identifier, its timeline, and the numbers of the database and of the table.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from outbox.statement import Statement

if TYPE_CHECKING:
    import asyncpg

__all__ = ["DOUBT", "EPOCH", "WITNESS", "Vigil", "doubt"]

_log = logging.getLogger("outbox.relay")

_EPOCH = """
select concat_ws('/',
           (select system_identifier from pg_control_system()),
           left(pg_walfile_name(pg_current_wal_insert_lsn()), 8),
           (select oid from pg_database where datname = current_database()),
           cast(cast('{schema}.outbox' as regclass) as oid)) as epoch
"""

EPOCH = Statement(_EPOCH)

# Whoever is first writes it down; everybody is told which it is, how far positions have been given, and how far those
# go that committed.
WITNESS = Statement(
    """
with current as materialized ([epoch]), noted as (
    update {schema}.outbox_secondary as secondary
    set epoch = current.epoch,
        doubted_at = case when secondary.epoch is null then secondary.doubted_at else statement_timestamp() end
    from current
    where secondary.backend_id = :backend_id and secondary.epoch is distinct from current.epoch
    returning secondary.doubted_at is not distinct from statement_timestamp() as doubted
)
select current.epoch,
       (select case when is_called then last_value else 0 end from {schema}.outbox_event_id_seq) as highest,
       coalesce((select max(event_id) from {schema}.outbox), 0) as committed,
       coalesce((select doubted from noted), false) as doubted
from current
""".replace("[epoch]", _EPOCH)
)

# The turn reads it: from here on no relay carries anything to this secondary, however far positions come by themselves.
DOUBT = Statement("""
update {schema}.outbox_secondary
set beyond = greatest(beyond, cast(:position as bigint)), doubted_at = statement_timestamp()
where backend_id = :backend_id
""")


class Vigil:
    """Sees for one relay and one secondary whether the primary is still the one it was."""

    def __init__(self, backend_id: str) -> None:
        self._backend_id = backend_id
        self._epoch: str | None = None
        self._committed = 0

    async def went_back(self, connection: asyncpg.Connection[Any], schema: str) -> bool:
        """Whether there was another epoch before, or positions were given again; raises if this role cannot see it."""
        row = await connection.fetchrow(*WITNESS.arguments(schema, {"backend_id": self._backend_id}))
        assert row is not None, "the epoch is always one row"
        epoch, highest, committed, doubted = row
        # What was only drawn an ordinary crash may take with it; what was visible was on disk.
        again = highest < self._committed
        if again and not doubted:
            await doubt(connection, schema, self._backend_id)
        back = doubted or again or self._epoch not in (None, epoch)
        if back:
            fields = {"outbox_backend_id": self._backend_id, "outbox_error_code": "history"}
            _log.warning(
                "%s: this is another primary, or one from a backup; ask `outbox doctor`", self._backend_id, extra=fields
            )
        self._epoch, self._committed = epoch, committed if back else max(committed, self._committed)
        return back


async def doubt(connection: asyncpg.Connection[Any], schema: str, backend_id: str, position: int | None = None) -> None:
    """Write down that history went back, and which position a secondary holds that the primary has not given."""
    await connection.execute(*DOUBT.arguments(schema, {"backend_id": backend_id, "position": position}))
