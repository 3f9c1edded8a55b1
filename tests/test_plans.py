"""Plans: the relay reads by index and takes what it asked for, whatever the planner believes about the tables."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import cycle
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from psycopg import sql
from relaying import load_opened
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from waiting import eventually

from outbox import Applied, RetryPolicy, SyncConfig
from outbox.attempt import Attempt
from outbox.claim import CLAIM, CLAIM_FEW, claim, claim_few
from outbox.lanes import Lanes, advance_floors
from outbox.primary import Primary
from outbox.prune import FOLD, PRUNE_ATTEMPTS, PRUNE_EVENTS
from outbox.recording import RECORD
from outbox.resume import RESUME, resume
from outbox.settle import settle
from outbox.statement import Statement
from outbox.testing.postgres import PostgresServer
from outbox.turn import TURN, take_turn
from tests.conftest import new_database
from tests.test_golden_sql import statements

Connection = asyncpg.Connection
Node = dict[str, Any]

MANY, FEW = 200_000, 2_000
RUN_BY_THE_RELAY = ("breaker", "claim", "lanes", "lease", "load", "prune", "resume", "seize", "settle", "turn")
RELAYED = {name: each for name, each in statements().items() if name.split(".")[0] in RUN_BY_THE_RELAY}

# What of an index a scan has to use: less of it, and the scan grows with the table.
WAYS = {
    "outbox_pkey": {"event_id"},
    "outbox_delivery_pkey": {"backend_id", "lane", "event_id"},
    "outbox_attempt_pkey": {"backend_id", "attempt_id"},
    "outbox_attempt_open": {"backend_id", "attempt_id"},
    "outbox_hold_pkey": {"backend_id", "key_hash"},
    "outbox_hold_due": {"backend_id", "alone", "next_attempt_at"},
    "outbox_hold_in_hand": {"backend_id"},
    "outbox_discarded_age": {"discarded_at"},
}
# Whether a secondary has any hold: that stops at the first.
ANY_HOLD = ({"turn.TURN", "claim.CLAIM", "claim.CLAIM_FEW"}, "outbox_hold_pkey", {"backend_id"})

FILL = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation)
    select 'tenant-' || n % 100, 'Thing', n::text, 'delete' from generate_series(1, $1) as n
    returning event_id, tenant_id, resource_type, resource_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select 'search', (hashtextextended(tenant_id, 0) & 63)::smallint, event_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0)
from event
"""
HOLD = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation)
    select 'tenant-' || n % 100, 'Held', gen_random_uuid(), 'delete' from generate_series(1, $1) as n
    returning *
)
insert into outbox_hold (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id, owed_since,
    state, attempts, next_attempt_at)
select 'search', tenant_id, resource_type, resource_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0),
       array[event_id], event_id, created_at, 'retrying', 1, now()
from event
"""
# Below all others.
OPEN = """
insert into outbox_attempt (backend_id, attempt_id, relay_id, event_ids, key_hashes, lease_until)
overriding system value
values ('search', -1, gen_random_uuid(), '{1}', '{1}', now() + interval '1 day')
on conflict do nothing
"""
FOLDED = "update outbox_secondary set folded_through = (select max(attempt_id) from outbox_attempt)"
HISTORY = """
insert into outbox_attempt (backend_id, relay_id, event_ids, key_hashes, lease_until, finished_at)
select 'search', gen_random_uuid(), array[n], array[n], now(), now() from generate_series(1, $1) as n
"""
TABLES = ("outbox", "outbox_delivery", "outbox_attempt", "outbox_hold", "outbox_discarded", "outbox_secondary")


async def fill(connection: Connection, deliveries: int, holds: int = 0, attempts: int = 0) -> None:
    await connection.execute(FILL, deliveries)
    await connection.execute(HOLD, holds)
    await connection.execute(HISTORY, attempts)


async def leave_statistics_to_us(connection: Connection, *, ordering: str = "state") -> None:
    for table in TABLES:
        await connection.execute(f"alter table {table} set (autovacuum_enabled = off)")
    await connection.execute("insert into outbox_secondary (backend_id, ordering) values ('search', $1)", ordering)


@asynccontextmanager
async def pinned(engine: AsyncEngine) -> AsyncIterator[Connection]:
    """A connection as the relay makes it."""
    connection = await Primary(engine, SyncConfig(statement_timeout=timedelta(minutes=2))).reserved()
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def plain(engine: AsyncEngine) -> AsyncIterator[Connection]:
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


class Prepared:
    """Statements prepared by name, so that each keeps the generic plan it made first, as the driver's do."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._names: dict[str, tuple[str, tuple[str, ...]]] = {}

    async def plan(self, statement: Statement, options: str = "", **parameters: Any) -> Node:
        """Its plan. Under a generic plan the values make no difference, so by default they are all null."""
        if statement.sql not in self._names:
            text, parameter_names = statement.asyncpg("public")
            name = f"look_{len(self._names)}"
            await self._connection.execute(f"prepare {name} as {text}")
            self._names[statement.sql] = (name, parameter_names)
        name, parameter_names = self._names[statement.sql]
        values = ", ".join(_literal(parameters.get(each)) for each in parameter_names)
        executed = f"execute {name} ({values})" if values else f"execute {name}"
        answer = await self._connection.fetchval(f"explain (format json {options}) {executed}")
        (explained,) = json.loads(answer) if isinstance(answer, str) else answer
        plan: Node = explained["Plan"]
        return plan

    async def all_plans(self) -> dict[str, Node]:
        return {name: await self.plan(statement) for name, statement in RELAYED.items()}


def _literal(value: Any) -> str:
    return "null" if value is None else sql.Literal(value).as_string(None)


def nodes(plan: Node) -> Iterator[Node]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def detours(statement: str, plan: Node) -> list[str]:
    """What in a plan grows with a table. The registry has a handful of rows, and may be read as a whole."""
    found = []
    for node in nodes(plan):
        table, kind = node.get("Relation Name"), node["Node Type"]
        if table not in TABLES or table == "outbox_secondary" or kind in ("ModifyTable", "Tid Scan"):
            continue
        index, condition = node.get("Index Name", ""), node.get("Index Cond", "")
        # A condition reads `(column = what)`, whatever stands on its right.
        used = set(re.findall(r"\((\w+) [<>=]", condition))
        any_hold = statement in ANY_HOLD[0] and (index, used) == ANY_HOLD[1:] and "Filter" not in node
        enough = WAYS.get(index, {"an index"}) <= used or any_hold
        if not enough or kind not in ("Index Scan", "Index Only Scan"):
            found.append(f"{kind} on {table} by {index or 'no index'} with {condition or 'no condition'}")
    return found


async def look_at_all_states(url: str) -> dict[str, dict[str, Node]]:
    """Every plan in every state the tables and their statistics may be in, by the name of the state."""
    engine = create_async_engine(url, poolclass=NullPool)
    seen: dict[str, dict[str, Node]] = {}

    async def fresh(state: str) -> None:
        async with pinned(engine) as connection:
            seen[state] = await Prepared(connection).all_plans()

    async with plain(engine) as admin, pinned(engine) as first, pinned(engine) as second:
        await leave_statistics_to_us(admin)
        early, late = Prepared(first), Prepared(second)
        seen["empty"] = await early.all_plans()
        await fill(admin, MANY, holds=5_000, attempts=5_000)
        seen["prepared while empty, then filled"] = await early.all_plans()
        await fresh("filled, never analyzed")
        await admin.execute("vacuum analyze")
        await fresh("filled and analyzed")
        for table in TABLES[:4]:
            await admin.execute(f"delete from {table}")
        await fresh("statistics of full tables, now empty")
        await admin.execute("vacuum analyze")
        seen["drained and vacuumed"] = await late.all_plans()
        await fill(admin, MANY, holds=5_000, attempts=5_000)
        seen["prepared while drained and vacuumed, then filled"] = await late.all_plans()
        await fresh("statistics of empty tables, now filled")
    await engine.dispose()
    return seen


STATES = (
    "empty",
    "prepared while empty, then filled",
    "filled, never analyzed",
    "filled and analyzed",
    "statistics of full tables, now empty",
    "drained and vacuumed",
    "prepared while drained and vacuumed, then filled",
    "statistics of empty tables, now filled",
)


@pytest.fixture(scope="module")
def seen(postgres: PostgresServer, template: str) -> Iterator[dict[str, dict[str, Node]]]:
    with new_database(postgres, template) as name:
        yield asyncio.run(look_at_all_states(postgres.dsn(name)))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("statement", sorted(RELAYED))
def test_plan_reads_by_index_only_what_it_needs(seen: dict[str, dict[str, Node]], statement: str, state: str) -> None:
    """DESIGN 4: the plan must not depend on statistics; every access is by an index that exists for it."""
    assert detours(statement, seen[state][statement]) == []


def test_no_state_was_left_out(seen: dict[str, dict[str, Node]]) -> None:
    assert tuple(seen) == STATES


async def test_without_the_pins_a_detour_is_seen(primary: AsyncEngine) -> None:
    """So the looking itself can fail."""
    async with plain(primary) as connection:
        await leave_statistics_to_us(connection)
        await fill(connection, 1_000, holds=1_000, attempts=1_000)
        await connection.execute("analyze; set plan_cache_mode = force_generic_plan; set enable_indexscan = off")
        await connection.execute("set enable_indexonlyscan = off")
        plans = await Prepared(connection).all_plans()
    assert [
        name for name, plan in plans.items() if name.endswith(("CLAIM", "SETTLE")) and not detours(name, plan)
    ] == []


PLANNERS = {
    "defaults": "select",
    "nested loops only": "set enable_hashjoin = off; set enable_mergejoin = off",
    "hash joins only": "set enable_nestloop = off; set enable_mergejoin = off",
    "merge joins only": "set enable_nestloop = off; set enable_hashjoin = off",
    "sequential scans only": "set enable_indexscan = off; set enable_indexonlyscan = off; set enable_bitmapscan = off",
    "bitmap scans only": "set enable_seqscan = off; set enable_indexscan = off; set enable_indexonlyscan = off",
    "nothing kept": "set enable_material = off; set enable_memoize = off; set enable_sort = off",
    "joins as written": "set join_collapse_limit = 1; set from_collapse_limit = 1",
    "generic plans": "set plan_cache_mode = force_generic_plan",
    "custom plans": "set plan_cache_mode = force_custom_plan",
    "parallel": "set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0",
}
# As if the tables had been analyzed at the worst moment.
BELIEFS = {
    "no statistics": "select",
    "believed empty": "update pg_class set reltuples = 0, relpages = 0 where relname ~ '^outbox'",
    "believed huge": "update pg_class set reltuples = 1e9, relpages = 10000000 where relname ~ '^outbox'",
}


@pytest.mark.parametrize("planner", [*PLANNERS, "pinned"])
async def test_a_claim_takes_at_most_what_it_asked_for(primary: AsyncEngine, planner: str) -> None:
    """L8, and that nothing is taken twice or left: a limited, locking select must be evaluated once."""
    async with plain(primary) as admin, (pinned if planner == "pinned" else plain)(primary) as connection:
        await leave_statistics_to_us(admin)
        # To compile what is believed to be huge takes a minute, and changes no answer.
        await connection.execute(f"set jit = off; {PLANNERS.get(planner, 'select')}")
        for belief in BELIEFS.values():
            await fill(admin, 150, holds=30)
            await admin.execute(belief)
            taken = await take_everything(connection, most=180, batch_size=17, slots=2)
            recorded = "select event_id from outbox order by event_id desc limit 180"
            assert sorted(taken, reverse=True) == [row[0] for row in await admin.fetch(recorded)]


async def take_everything(connection: Connection, most: int, *, batch_size: int, slots: int) -> list[int]:
    """Take turns at resuming, claiming many and claiming a few, each time no more than was asked for."""
    taken: list[int] = []
    for _, how in zip(range(3 * most), cycle(("resume", "claim", "claim few"))):
        limit = batch_size * slots if how == "claim" else batch_size
        attempts = await take(connection, Lanes(), batch_size=batch_size, slots=slots, how=how)
        events = [event.position or 0 for attempt in attempts for event in attempt.events]
        assert len(events) <= limit
        taken += events
        if len(taken) >= most:
            break
    return taken


async def take(
    connection: Connection, lanes: Lanes, *, batch_size: int, slots: int = 1, how: str = "claim"
) -> list[Attempt]:
    """Claim and settle by hand what a relay would in one step."""
    relay_id, policy = uuid4(), RetryPolicy.from_config(SyncConfig())
    parameters: dict[str, Any] = {"relay_id": relay_id, "lanes": lanes, "lease": timedelta(minutes=1)}
    async with connection.transaction():
        turn = await take_turn(connection, "public", "search")
        assert turn is not None
        parameters |= {"backend_id": "search", "turn": turn, "batch_size": batch_size}
        if how == "resume":
            resumed = await resume(connection, "public", **parameters)
            opened = [resumed.attempt_id] if resumed.attempt_id else []
        elif how == "claim few":
            few = await claim_few(connection, "public", **parameters, batch_bytes=2**24)
            assert all(loaded for _, loaded in few)
            opened = [attempt_id for attempt_id, _ in few]
        else:
            opened = await claim(connection, "public", **parameters, slots=slots)
        attempts = [await load_opened(connection, turn, "search", relay_id, attempt_id) for attempt_id in opened]
    for attempt in attempts:
        applied = [Applied()] * len(attempt.events)
        assert await settle(connection, "public", relay_id, attempt, applied, policy)
    return attempts


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_resuming_takes_at_most_a_batch_however_much_the_holds_owe(primary: AsyncEngine, ordering: str) -> None:
    """L8: a batch is bounded in memory and in time for its lease, also after an outage left much behind."""
    batch_size = 10
    async with plain(primary) as connection:
        await leave_statistics_to_us(connection, ordering=ordering)
        await fill(connection, 0, holds=20)
        await connection.execute(FILL, 40 * 20)
        await connection.execute("delete from outbox_delivery")
        # Each hold owes forty more, as when a batch was handed back.
        await connection.execute(
            "update outbox_hold set event_ids = event_ids || array(select event_id from outbox where event_id % 20 = "
            "outbox_hold.event_ids[1] % 20 and resource_type = 'Thing' order by event_id)"
        )
        (resumed,) = await take(connection, Lanes(), batch_size=batch_size, how="resume")
    assert len(resumed.events) <= batch_size


CLAIMS = {"claim": CLAIM, "claim few": CLAIM_FEW, "resume": RESUME}


def question(lanes: Lanes, batch_size: int = 100) -> dict[str, Any]:
    asked = lanes.shares(batch_size)
    return {
        "backend_id": "search",
        "relay_id": uuid4(),
        "folded_through": 0,
        "batch_size": batch_size,
        "batch_bytes": 2**24,
        "page_size": 1_000,
        "slots": 1,
        "lease": timedelta(minutes=1),
        "log_order": False,
        "alone": False,
        "lanes": asked.lanes,
        "floors": asked.floors,
        "shares": asked.shares,
    }


async def pages_touched(connection: Connection, prepared: Prepared, statement: Statement, **parameters: Any) -> int:
    """How many pages one execution really touches; it is rolled back."""
    transaction = connection.transaction()
    await transaction.start()
    plan = await prepared.plan(statement, ", analyze, buffers, timing off", **parameters)
    await transaction.rollback()
    # A writing part that nobody reads from runs after the top of the plan, and is not in its sum.
    parts = [plan, *(node for node in nodes(plan) if node["Node Type"] == "ModifyTable")]
    return sum(part["Shared Hit Blocks"] + part["Shared Read Blocks"] for part in parts)


def untouched() -> Lanes:
    return Lanes()


def all_full() -> Lanes:
    """What a relay knows when every lane filled its share last time: it will ask them all."""
    lanes = Lanes()
    asked = lanes.shares(100)
    lanes.learn(asked, [(lane, 100) for lane in asked.lanes], full=True)
    return lanes


@pytest.mark.parametrize("knowing", [untouched, all_full])
@pytest.mark.parametrize("statement", CLAIMS.values(), ids=CLAIMS)
async def test_a_claim_touches_as_much_of_a_deep_backlog_as_of_a_small_one(
    primary: AsyncEngine, statement: Statement, knowing: Callable[[], Lanes]
) -> None:
    """PERFORMANCE: the claim stops after its batch; one plan, made while the tables were empty, for both."""
    async with plain(primary) as admin, pinned(primary) as connection:
        await leave_statistics_to_us(admin)
        prepared = Prepared(connection)
        await prepared.plan(statement)
        touched = []
        for deliveries in (FEW, MANY - FEW):
            await fill(admin, deliveries, holds=deliveries // 40, attempts=deliveries // 40)
            await admin.execute("update outbox_hold set next_attempt_at = now() + interval '1 hour'")
            touched.append(await pages_touched(connection, prepared, statement, **question(knowing())))
    assert touched[0] > 100
    assert touched[1] <= 2 * touched[0], touched


@pytest.mark.parametrize(
    ("statement", "arrange"),
    [(PRUNE_EVENTS, FOLDED), (PRUNE_ATTEMPTS, FOLDED), (FOLD, OPEN)],
    ids=["prune events", "prune attempts", "fold above an attempt that stays open"],
)
async def test_housekeeping_touches_as_much_of_many_that_stay_as_of_few(
    primary: AsyncEngine, statement: Statement, arrange: str
) -> None:
    """G5: with nothing to be done it looks at one page; it comes every few seconds, however much is kept."""
    terms: dict[str, Any] = {"after": 0, "keep": timedelta(hours=1), "page_size": 1_000, "backend_ids": []}
    terms |= {"throughs": [], "backend_id": "search", "folded_through": -10, "most": 1_000}
    async with plain(primary) as admin, pinned(primary) as connection:
        await leave_statistics_to_us(admin)
        prepared, touched = Prepared(connection), []
        for many in (FEW, MANY // 4 - FEW):
            await fill(admin, many, attempts=many)
            await admin.execute(arrange)
            touched.append(await pages_touched(connection, prepared, statement, **terms))
    assert touched[0] > 10
    assert touched[1] <= 2 * touched[0], touched


async def test_recording_many_reads_the_registry_once(primary: AsyncEngine) -> None:
    """And not for every row: its rows change every second, and where vacuum is held up it is long."""
    columns = ("tenant_ids", "resource_types", "resource_ids", "operations", "versions", "fhir_versions", "contents")
    values = {name: ["update" if name == "operations" else "1"] * 50 for name in columns}
    async with plain(primary) as connection:
        await leave_statistics_to_us(connection)
        plan = await Prepared(connection).plan(
            RECORD, ", analyze, timing off", **values, bulk_ids=[None] * 50, headers=[None] * 50
        )
    read = [node for node in nodes(plan) if node.get("Relation Name") == "outbox_secondary"]
    assert read
    assert max(node["Actual Loops"] for node in read) == 1


async def test_a_turn_touches_as_much_of_many_due_holds_as_of_few(primary: AsyncEngine) -> None:
    """Every claim begins with a turn, also the first ones after an outage, when everything that was held is due."""
    async with plain(primary) as admin, pinned(primary) as connection:
        await leave_statistics_to_us(admin)
        prepared, touched = Prepared(connection), []
        for holds in (20, 20_000):
            await fill(admin, 0, holds)
            touched.append(await pages_touched(connection, prepared, TURN, backend_id="search"))
    assert touched[1] <= 2 * touched[0], touched


@pytest.mark.parametrize("statement", CLAIMS.values(), ids=CLAIMS)
async def test_dead_entries_below_the_floors_cost_a_claim_nothing(primary: AsyncEngine, statement: Statement) -> None:
    """DESIGN 4: while an old snapshot keeps vacuum off, what was delivered is not walked again."""
    dead = 50_000
    async with plain(primary) as admin, pinned(primary) as connection, plain(primary) as holder:
        await leave_statistics_to_us(admin)
        await holder.execute("begin isolation level repeatable read; select count(*) from outbox")
        prepared, lanes = Prepared(connection), all_full()
        await prepared.plan(statement)
        await fill(admin, FEW)
        few = await pages_touched(connection, prepared, statement, **question(lanes))
        await fill(admin, dead)
        await admin.execute("delete from outbox_delivery where event_id <= $1", dead)
        await admin.execute("vacuum outbox_delivery")
        walked = await pages_touched(connection, prepared, statement, **question(lanes))

        async def raised() -> bool:
            await advance_floors(connection, "public", "search", lanes)
            return min(lanes.floors) >= dead

        await eventually(raised)
        stepped_over = await pages_touched(connection, prepared, statement, **question(lanes))
        await holder.execute("rollback")
    assert walked > 4 * few, "the dead entries are gone, so this shows nothing"
    assert stepped_over <= 2 * few, (few, stepped_over, walked)
