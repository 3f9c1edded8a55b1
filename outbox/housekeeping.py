"""Housekeeping: what a relay does beside carrying: fold, prune, forget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from outbox.carrier import Carrier
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.prune import prune_attempts, prune_discarded, prune_events, prune_reconciliations
from outbox.settings import SyncConfig

__all__ = ["keep_tidy", "tidy"]

_log = logging.getLogger("outbox.relay")


async def keep_tidy(primary: Primary, config: SyncConfig, carriers: Sequence[Carrier]) -> None:
    """Tidy every `prune_interval`, for ever; a primary that fails is asked again the next time."""
    while True:
        await asyncio.sleep(config.prune_interval.total_seconds())
        try:
            await tidy(primary, config, carriers)
        except PRIMARY_FAILED as error:
            _log.warning("housekeeping failed (%s)", code_of(error))


async def tidy(primary: Primary, config: SyncConfig, carriers: Sequence[Carrier]) -> None:
    """Fold finished attempts into the totals, and prune for at most `prune_interval`."""
    schema = config.database_schema
    for carrier in carriers:
        await carrier.tidy()
    async with primary.connection() as connection:
        await prune_discarded(connection, schema, config.keep_attempts)
        await prune_reconciliations(connection, schema, config.keep_attempts)
        deadline = time.monotonic() + config.prune_interval.total_seconds()
        while await prune_attempts(connection, schema, config.keep_attempts) and time.monotonic() < deadline:
            pass
        after: int | None = 0
        while after is not None and time.monotonic() < deadline:
            after = await prune_events(connection, schema, config.keep_events, after)
