"""How the rate of one relay grows with secondaries and with the size of what it carries.

    python -m benchmarks --only growth [--runs 5] [--scale 1.0]

The number of deliveries is the same for every number of secondaries. Contents are from 200 bytes to a megabyte, as many
as fit 400 MB in all; a relay's memory is bounded by `batch_bytes`, whatever they are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from benchmarks.drained import Asked, Drain, drained, filled
from benchmarks.ground import Row, outbox_database
from outbox.testing.postgres import EmbeddedPostgres

DELIVERIES = 60_000
SECONDARIES = (1, 2, 4, 8, 16)
SIZES = (200, 2_000, 20_000, 200_000, 1_048_576)
BYTES = 400_000_000
BATCH = 100
GOAL_MB = 300


async def owed_to(dsn: str, secondaries: int, deliveries: int) -> Drain:
    """Drain so many deliveries to so many secondaries, in one relay."""
    names = [f"secondary-{number}" for number in range(secondaries)]
    events = deliveries // secondaries
    await filled(dsn, events, secondaries=names)
    return await drained(Asked(dsn, BATCH, secondaries=names, most=events * secondaries))


async def of_size(dsn: str, size: int, scale: float) -> Drain:
    """Drain contents of so many bytes."""
    events = max(3 * BATCH // 2, min(int(DELIVERIES * scale), int(BYTES * scale) // size))
    frame = '{"note":""}'
    await filled(dsn, events, content=frame[:-2] + "x" * (size - len(frame)) + frame[-2:])
    return await drained(Asked(dsn, BATCH, most=events))


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the rate by secondaries and by size, and the peak memory of the relay for the largest."""
    async with outbox_database(server) as name:
        dsn = server.dsn(name, driver="postgresql")
        for size in SIZES:
            found = [await of_size(dsn, size, scale) for _ in range(runs)]
            rates = [each.rate for each in found]
            yield Row(f"events/s of {size:,} bytes", rates, curve="payload:events per second", x=size)
            yield Row(f"  MB/s of {size:,} bytes", [rate * size / 1e6 for rate in rates])
            most = GOAL_MB if size == SIZES[-1] else None
            yield Row(f"  relay's peak MB, events of {size:,} bytes", [each.peak_mb for each in found], most=most)
        for secondaries in SECONDARIES:
            async with outbox_database(server, "bench_secondaries") as other:
                dsn = server.dsn(other, driver="postgresql")
                deliveries = max(3_200, int(DELIVERIES * scale))
                rates = [(await owed_to(dsn, secondaries, deliveries)).rate for _ in range(runs)]
            what = f"deliveries/s of one relay to {secondaries} secondaries"
            yield Row(what, rates, curve="secondaries:deliveries by one relay", x=secondaries)
