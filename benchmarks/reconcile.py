"""What a proof costs: against a plain ordered scan of both sides, in memory, and in content that is read.

    python -m benchmarks --only reconcile [--runs 5] [--scale 1.0]

The primary and a second PostgreSQL database, each with a million resources of 500 bytes at full scale. The scan is
what nobody can do without who reads both sides: two connections that fetch ids and contents in order, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
from sqlalchemy import Text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.ground import Row, outbox_database
from outbox import SyncManager
from outbox.secondaries.sql import SqlSecondary
from outbox.testing.postgres import EmbeddedPostgres

RESOURCES = 1_000_000
FILL = """
insert into {table} ({columns})
select {values} from (
    select lpad(n::text, 12, '0') as id, '{{"n": ' || n || ', "note": "' || repeat('x', 470) || '"}}' as content
    from generate_series(1, $1) as n
) as made
"""
SECOND = "bench_second"


class Base(DeclarativeBase): ...


class Observation(Base):
    __tablename__ = "observation"
    id: Mapped[str] = mapped_column(primary_key=True)
    content: Mapped[str] = mapped_column(Text)


def manager_on(primary: str, second: str, how: str) -> SyncManager:
    """A manager whose content is a column, which the database can sum up, or comes from Python, which it cannot."""
    manager = SyncManager(create_async_engine(primary), [SqlSecondary("second", second)])
    content: Any = Observation.content if how == "column" else lambda row: row.content
    manager.track(Observation, resource_id=Observation.id, content=content)
    return manager


async def prove(primary: str, second: str, how: str) -> dict[str, float]:
    """The child: compare everything once; say how long it took, what it read, and how much memory that took."""
    manager = manager_on(primary, second, how)
    found = await manager.reconcile("second")
    await manager.aclose()
    await manager.engine.dispose()
    drift = found.missing + found.extra + found.stale + found.altered
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = found.duration.total_seconds()
    return {"seconds": seconds, "rate": found.rate, "listed": found.listed, "drift": drift, "peak": peak}


def proved(primary: str, second: str, how: str) -> dict[str, float]:
    """Run the child, whose memory is its own."""
    command = [sys.executable, "-m", "benchmarks.reconcile", "--child", primary, second, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


async def scanned(primary: str, second: str) -> float:
    """Seconds to read both sides in order, side by side."""
    started = time.perf_counter()
    await asyncio.gather(
        _read(primary, "select id, content from observation order by id"),
        _read(second, "select resource_id, content from outbox_resources order by resource_id"),
    )
    return time.perf_counter() - started


async def _read(dsn: str, sql: str) -> None:
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        cursor = await connection.cursor(sql)
        while await cursor.fetch(1_000):
            pass
    await connection.close()


async def fill(primary: str, second: str, resources: int) -> None:
    """Write both sides alike, past everything."""
    manager = manager_on(primary.replace("postgresql:", "postgresql+asyncpg:"), second.replace(":", "+asyncpg:", 1), "")
    await manager.register()
    async with manager.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await manager.registrations[0].secondary.highest_position()  # type: ignore[attr-defined]
    await manager.aclose()
    await manager.engine.dispose()
    there = await asyncpg.connect(primary)
    await there.execute(FILL.format(table="observation", columns="id, content", values="id, content"), resources)
    await there.execute("vacuum analyze observation")
    await there.close()
    there = await asyncpg.connect(second)
    columns = "tenant_id, resource_type, resource_id, position, content"
    values = "'default', 'Observation', id, 0, content"
    await there.execute(FILL.format(table="outbox_resources", columns=columns, values=values), resources)
    await there.execute("vacuum analyze outbox_resources")
    await there.close()


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the cost of equal sides, its memory and rate, and what is read to find one resource of them all."""
    resources = max(20_000, int(RESOURCES * scale))
    admin = await asyncpg.connect(server.dsn("postgres", driver="postgresql"))
    await admin.execute(f"create database {SECOND}")
    async with outbox_database(server) as name:
        plain = server.dsn(name, driver="postgresql"), server.dsn(SECOND, driver="postgresql")
        urls = server.dsn(name), server.dsn(SECOND)
        await fill(*plain, resources)
        # Objects of the ORM cost more than the scan by themselves: what comes from Python informs, and is no goal.
        for how, most, times in (("column", 2.0, runs), ("function", None, 1)):
            ratios, found = [], []
            for _ in range(times):
                found.append(await asyncio.to_thread(proved, *urls, how))
                ratios.append(found[-1]["seconds"] / await scanned(*plain))
            assert not any(each["drift"] for each in found)
            yield Row(f"reconcile / ordered scan of both, {resources:,} equal, content by {how}", ratios, most=most)
            yield Row(f"its peak MB, content by {how}", [each["peak"] for each in found], most=200)
            yield Row(f"its thousand resources per second, content by {how}", [each["rate"] / 1e3 for each in found])
        second = await asyncpg.connect(plain[1])
        altered = "update outbox_resources set content = '{\"n\": 0}' where resource_id = $1"
        await second.execute(altered, str(resources * 2 // 3).zfill(12))
        await second.close()
        found = [await asyncio.to_thread(proved, *urls, "column") for _ in range(runs)]
        assert {each["drift"] for each in found} == {1}
        share = [each["listed"] / resources * 100 for each in found]
        yield Row("content read to find one altered resource, % of all", share, most=1)
    await admin.execute(f"drop database {SECOND} with (force)")
    await admin.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=3, required=True)
    print(json.dumps(asyncio.run(prove(*parser.parse_args().child))))


if __name__ == "__main__":
    main()
