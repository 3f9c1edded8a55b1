"""The question of how far behind everybody is costs as much with a long history as with a short one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.status import LAG
from tests.test_plans import FEW, HISTORY, MANY, TABLES, Connection, Node, nodes, plain

FOLD = "update outbox_secondary set folded_through = coalesce((select max(attempt_id) from outbox_attempt), 0)"
SHARE = "update outbox_attempt set backend_id = ($1::text[])[1 + attempt_id % $2] where backend_id = 'search'"
SINCE = 50


async def settle_history(connection: Connection, attempts: int, backend_ids: Sequence[str]) -> None:
    """Add so many closed attempts that are folded, and some that are not."""
    await connection.execute(HISTORY, attempts)
    if len(backend_ids) > 1:
        await connection.execute(SHARE, backend_ids, len(backend_ids))
    await connection.execute(FOLD)
    await connection.execute(HISTORY, SINCE)


async def look(connection: Connection) -> Node:
    """The plan of what `outbox status` asks, and what it really touched."""
    answer = await connection.fetchval("explain (format json, analyze, buffers, timing off) " + LAG.on("public"))
    (explained,) = json.loads(answer) if isinstance(answer, str) else answer
    plan: Node = explained["Plan"]
    return plan


def touched(plan: Node) -> int:
    pages: int = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return pages


def read_of_history(plan: Node) -> list[tuple[str, Any]]:
    """How the attempts are reached, and how many rows that threw away."""
    scans = [node for node in nodes(plan) if node.get("Relation Name") == "outbox_attempt"]
    return [(node["Node Type"], node.get("Rows Removed by Filter", 0)) for node in scans]


@pytest.mark.parametrize("backend_ids", [["search"], ["cache", "graph", "search"]], ids=["one", "three"])
@pytest.mark.parametrize("analyzed", [True, False], ids=["analyzed", "never analyzed"])
async def test_status_touches_as_much_of_a_long_history_as_of_a_short_one(
    primary: AsyncEngine, backend_ids: list[str], analyzed: bool
) -> None:
    """N5: what was folded is not read again, whatever the planner believes; only what is owed is counted row by row."""
    async with plain(primary) as connection:
        for table in TABLES:
            await connection.execute(f"alter table {table} set (autovacuum_enabled = off)")
        await connection.execute("insert into outbox_secondary (backend_id) select unnest($1::text[])", backend_ids)
        seen = []
        for attempts in (FEW, MANY):
            await settle_history(connection, attempts, backend_ids)
            if analyzed:
                await connection.execute("vacuum analyze outbox_attempt")
            seen.append(await look(connection))
    pages = [touched(plan) for plan in seen]
    assert pages[1] <= 2 * pages[0], (pages, [read_of_history(plan) for plan in seen])
    assert "Seq Scan" not in [kind for kind, _ in read_of_history(seen[1])]


async def test_status_counts_since_the_last_fold_and_before_it(primary: AsyncEngine) -> None:
    """N1, N5: the totals are the same wherever the fold is; one secondary without any attempt has none."""
    async with plain(primary) as connection:
        await connection.execute("insert into outbox_secondary (backend_id) values ('idle'), ('search')")
        await connection.execute(HISTORY, 7)
        await connection.execute("update outbox_attempt set applied = 1, stale = 2, error_code = 'busy'")
        query = "select applied, stale, last_error_code from outbox_lag order by backend_id"
        assert [tuple(row) for row in await connection.fetch(query)] == [(0, 0, None), (7, 14, "busy")]
        await connection.execute("update outbox_secondary set folded_through = 3, applied = 3, stale = 6")
        assert [tuple(row) for row in await connection.fetch(query)] == [(3, 6, None), (7, 14, "busy")]
