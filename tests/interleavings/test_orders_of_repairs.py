"""Repair and backfill against writers: whatever the order, the secondary ends as the primary is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncEvent, repair, writers
from outbox.filling import Filler
from outbox.paging import Extent, extents
from outbox.repair import Repairer
from outbox.source import Source
from tests.comparing import Note, said
from tests.interleavings.gates import COMMIT, Gates
from tests.interleavings.hand import Writer
from tests.interleavings.orders import Family
from tests.interleavings.player import Step, explore
from tests.interleavings.scenes import Scene
from tests.interleavings.stage import MIRROR, Stage

# Hundreds of orders in one test, on a machine that may have other things to do.
pytestmark = pytest.mark.timeout(900)

RECORD = "pg_current_xact_id"
WRITE = ("change", "record", "end")
KINDS = [(kind, ending) for kind in ("update", "delete", "delete and insert") for ending in ("commit", "rollback")]

RESTORES = Family(
    "restore and write",
    {"repairer": ("begin", "lock", "record", "commit"), "writer": WRITE},
    KINDS,
)

RESTORES_WITH_TWO = Family(
    "restore and two writers",
    {"repairer": ("lock", "record", "commit"), "one": WRITE, "two": WRITE},
    [("update", "delete"), ("delete", "delete and insert"), ("update", "update")],
    most=40,
)

REMOVES = Family(
    "remove and insert",
    {"repairer": ("begin", "record", "wait", "find", "commit"), "writer": WRITE},
    ["commit", "rollback"],
)

FILLS = Family(
    "backfill and write",
    {"filler": ("begin", "lock", "record", "commit"), "writer": WRITE},
    KINDS,
)

FILLS_TWICE = Family(
    "two backfills and a writer",
    {"one": ("lock", "record", "commit"), "two": ("lock", "commit"), "writer": WRITE},
    ["update", "delete"],
    most=45,
)


class Rewriter(Writer):
    """Writes its row in one of several ways."""

    kind = "update"

    async def write(self) -> None:
        if self.kind == "delete and insert":
            await self.connection.execute("delete from note where number = $1", self.event.resource_id)
        await super().write()


class Rows(Scene):
    """The primary has notes 1 to 3, the secondary has none, and an application writes note 2."""

    gates: Gates
    ours: list[Rewriter]

    async def open(self, *variant: str) -> Rows:
        await self.stage.clear()
        await self.stage.watching.execute(
            "insert into note select 'north', number::text, $1 from generate_series(1, 3) as number", said("first")
        )
        return self

    def waits_for_others(self, gates: Gates) -> bool:
        """Whether a removal has looked twice, in this step, for who still writes."""
        return sum("as writer" in statement for statement in gates.heard) > 1

    async def rewriter(self, actor: str, kind: str, ending: str = "commit", name: str = "2") -> Rewriter:
        written = SyncEvent.update("Note", name, said(f"{kind} of {actor}"), tenant_id="north")
        event = SyncEvent.delete("Note", name, tenant_id="north") if kind == "delete" else written
        rewriter = Rewriter(await self.stage.connection(actor), event, ending)
        rewriter.kind = kind
        return rewriter

    def repairer(self, gates: Gates) -> Repairer:
        source = Source(gates.engine, self.stage.manager.tracking)
        terms = {"actor": "test", "reason": "it differed"}
        return Repairer(gates.engine, "public", source, MIRROR, **terms, patience=timedelta(minutes=5))

    async def check(self) -> None:
        await self.drain()
        await self.equal()

    async def equal(self) -> None:
        """The secondary holds what the primary holds, and nothing else."""
        rows = await self.stage.watching.fetch("select number, content from note")
        held = {event.resource_id: event.content for event in self.secondary.held.values() if event.content is not None}
        assert held == {row["number"]: row["content"] for row in rows}


class Restores(Rows):
    async def open(self, *variant: str) -> Restores:
        await super().open()
        self.gates = self.stage.gates("repairer")
        kind, ending = variant
        self.ours = [await self.rewriter("writer", kind, ending)]
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        (ours,) = self.ours
        return {
            "repairer": self.gates.course(("FOR UPDATE", RECORD, COMMIT), self.restore),
            "writer": (ours.change, ours.record, ours.end),
        }

    async def restore(self) -> None:
        await self.repairer(self.gates).restore("north", "Note", ["1", "2", "3"])

    async def check(self) -> None:
        # Who was held by somebody for as long as it was tried is the next run's.
        await self.repairer(self.stage.gates("repairer")).restore("north", "Note", await self.missing())
        await super().check()

    async def missing(self) -> list[str]:
        """Return notes for which nobody has recorded anything: those that a next run would find."""
        statement = "select number from note where not exists (select from outbox where resource_id = note.number)"
        return [row[0] for row in await self.stage.watching.fetch(statement)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a repair sleeps between two looks decides nothing here."""
    monkeypatch.setattr(repair, "_PAUSE", 0.001)
    monkeypatch.setattr(writers, "_PAUSE", 0.001)


@pytest.fixture
async def stage(stage: Stage) -> Stage:
    stage.manager.track(Note, tenant=Note.tenant_id, resource_id=Note.number, content=Note.content)
    return stage


@RESTORES.in_each_variant
async def test_a_restore_and_a_writer(stage: Stage, variant: tuple[str, str]) -> None:
    """R2, R3: the row's lock decides who draws first, and the newer wins."""
    await explore(RESTORES, lambda: Restores(stage).open(*variant))


class RestoresWithTwo(Restores):
    async def open(self, *variant: str) -> RestoresWithTwo:
        await super().open("update", "commit")
        self.ours = [await self.rewriter(name, kind) for name, kind in zip(("one", "two"), variant, strict=True)]
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        one, two = self.ours
        return {
            "repairer": self.gates.course((RECORD, COMMIT), self.restore),
            "one": (one.change, one.record, one.end),
            "two": (two.change, two.record, two.end),
        }


@RESTORES_WITH_TWO.in_each_variant
async def test_a_restore_and_two_writers(stage: Stage, variant: tuple[str, str]) -> None:
    """R2, R3: the same with one writer behind the other."""
    await explore(RESTORES_WITH_TWO, lambda: RestoresWithTwo(stage).open(*variant))


class Removes(Rows):
    """The secondary has a note 9 that the primary does not have, and an application inserts it."""

    removed: int | None = None

    async def open(self, *variant: str) -> Removes:
        await super().open()
        await self.stage.watching.execute("delete from note")
        self.gates = self.stage.gates("repairer")
        self.ours = [await self.rewriter("writer", "update", *variant, name="9")]
        self.secondary._keep(SyncEvent("north", "Note", "9", "create", said("nobody's"), position=0))
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        (ours,) = self.ours
        return {
            "repairer": self.gates.course((RECORD, "as writer", "FROM note", COMMIT), self.remove),
            "writer": (ours.change, ours.record, ours.end),
        }

    async def waits(self, actor: str) -> bool:
        return await super().waits(actor) or (actor == "repairer" and self.waits_for_others(self.gates))

    async def remove(self) -> None:
        self.removed = await self.repairer(self.gates).remove("north", "Note", ["9"])

    async def check(self) -> None:
        assert self.removed is not None
        if not self.ours[0].commits:
            assert self.removed == 1, "nobody inserted it"
        await super().check()


@REMOVES.in_each_variant
async def test_a_removal_and_an_insert(stage: Stage, variant: str) -> None:
    """R3: the delete never passes an insert, wherever it stands between its row, its event and its commit."""
    await explore(REMOVES, lambda: Removes(stage).open(variant))


class Fills(Rows):
    async def open(self, *variant: str) -> Fills:
        await super().open()
        self.gates = self.stage.gates("filler")
        kind, ending = variant
        self.ours = [await self.rewriter("writer", kind, ending)]
        await self.stage.watching.execute(
            "insert into outbox_backfill (backend_id, tenant_id, resource_type, total) values ($1, 'north', 'Note', 3)",
            MIRROR,
        )
        (self.extent,) = await extents(self.stage.primary, self.stage.manager.tracking, ["Note"])
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        (ours,) = self.ours
        return {
            "filler": self.gates.course(("FOR SHARE", RECORD, COMMIT), lambda: fill(self.gates.engine, self.extent)),
            "writer": (ours.change, ours.record, ours.end),
        }

    async def check(self) -> None:
        finished = "select finished_at is not null from outbox_backfill"
        assert await self.stage.watching.fetchval(finished), "the backfill has not come to its end"
        await super().check()


async def fill(engine: AsyncEngine, extent: Extent) -> None:
    """Record every page, as a backfill does: what was locked is come back for."""
    filler = Filler(engine, "public", MIRROR)
    while True:
        page = await filler.page(extent, 2)
        while page.missing:
            await filler.come_back(extent, page)
        if page.last:
            return


@FILLS.in_each_variant
async def test_a_page_and_a_writer(stage: Stage, variant: tuple[str, str]) -> None:
    """K1, K2: who wrote before has drawn before, and who writes later draws later."""
    await explore(FILLS, lambda: Fills(stage).open(*variant))


class FillsTwice(Fills):
    async def open(self, *variant: str) -> FillsTwice:
        await super().open(*variant, "commit")
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        (ours,) = self.ours
        one, two = self.stage.gates("one"), self.stage.gates("two")
        return {
            "one": one.course((RECORD, COMMIT), lambda: fill(one.engine, self.extent)),
            "two": two.course((COMMIT,), lambda: fill(two.engine, self.extent)),
            "writer": (ours.change, ours.record, ours.end),
        }


@FILLS_TWICE.in_each_variant
async def test_two_pages_and_a_writer(stage: Stage, variant: str) -> None:
    """K1, K4: two backfills share the work, and no writer slips between them."""
    await explore(FILLS_TWICE, lambda: FillsTwice(stage).open(variant))
