"""What must be there in the end, and what is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from outbox.content import content_digest
from outbox.event import SyncEvent
from outbox.secondaries.base import Findable, ResourceDigest
from outbox.status import Failure
from outbox.testing.lab_ground import TYPE, Ground
from outbox.testing.states import seen, visible

__all__ = ["Difference", "Read", "differences", "not_done"]

#: What a secondary holds of (tenant, type, id): JSON text or what it decodes to; None when nothing is there.
Read = Callable[[str, str, str], Awaitable[Any]]


class Difference(NamedTuple):
    """What differs after a scenario: of which key, and how. Positions and words only, never content."""

    scenario: str
    key: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.scenario}: {self.key}: expected {self.expected}, found {self.found}"


def not_done(scenario: str, dead: Iterable[Failure]) -> list[Difference]:
    """Return what a scenario left dead: in every one of them the faults end, so all has to be done."""
    return [
        Difference(scenario, _key(each.tenant_id, each.resource_id), "done", f"dead ({each.error_code})")
        for each in dead
    ]


async def differences(scenario: str, ground: Ground, read: Read | None) -> list[Difference]:
    """Compare what a secondary shows of a scenario's tenant with the newest event of each key on the primary."""
    newest = {event.resource_id: event for event in await ground.recorded()}
    if read is not None:
        return [each for event in newest.values() if (each := await _read(scenario, event, read))]
    expected = {name: _digest(event) for name, event in newest.items() if event.content is not None}
    found = await _shown(ground, list(newest))
    return [
        Difference(scenario, _key(ground.tenant_id, name), _word(ours), f"{_word(theirs, ours)} by {how}")
        for how, there in found.items()
        for name in sorted({*expected, *there})
        if (ours := expected.get(name)) != (theirs := there.get(name))
    ]


async def _shown(ground: Ground, names: Sequence[str]) -> Mapping[str, Mapping[str, ResourceDigest]]:
    """Return what each way of asking shows."""
    secondary, place = ground.secondary, (ground.tenant_id, TYPE)
    shown = {"scan": {each.resource_id: each for each in await seen(secondary, place)}}
    if isinstance(secondary, Findable):
        await visible(secondary)
        shown["find"] = {each.resource_id: each for each in await secondary.find(*place, names)}
    return shown


async def _read(scenario: str, event: SyncEvent, read: Read) -> Difference | None:
    there = await read(*event.key)
    if _same(there, event):
        return None
    expected = "nothing" if event.content is None else f"the content of position {event.position}"
    found = "nothing" if there is None else "another content"
    return Difference(scenario, _key(event.tenant_id, event.resource_id), expected, f"{found} by read")


def _same(there: Any, event: SyncEvent) -> bool:
    if isinstance(there, (str, bytes)) and event.content is not None:
        text = there if isinstance(there, str) else there.decode()
        return content_digest(text) == content_digest(event.content)
    return bool(there == event.decoded())


def _digest(event: SyncEvent) -> ResourceDigest:
    assert event.content is not None, "what was deleted is not expected"
    return ResourceDigest(event.resource_id, event.position or 0, content_digest(event.content))


def _word(digest: ResourceDigest | None, beside: ResourceDigest | None = None) -> str:
    if digest is None:
        return "nothing"
    altered = beside is not None and beside.position == digest.position
    return f"position {digest.position}{' with another content' if altered else ''}"


def _key(tenant_id: str, resource_id: str) -> str:
    return f"{tenant_id}/{TYPE}/{resource_id}"
