"""The demo's business: FHIR resources of two clinics in one table, and what changes in them on a busy day."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from pathlib import Path

import msgspec
from sqlalchemy import Text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox.errors import InvalidEvent, SettingsError
from outbox.event import SyncEvent
from outbox.manager import SyncManager
from outbox.testing.fhir import FhirResource, load

__all__ = ["TENANTS", "Key", "Life", "Resource", "class_of", "new_rows", "read_sample", "revised", "track_types"]

Key = tuple[str, str, str]

TENANTS = ("clinic-north", "clinic-south")

# Enough to see, and little enough for a minute on a small machine.
_TYPES = 12
_MOST_READ = 4_000
_MOST_BYTES = 64_000
_LEAST, _MOST = 30, 500


class _Base(DeclarativeBase):
    pass


class Resource(_Base):
    """One FHIR resource of one clinic; each type is a subclass, because a tracked class has one resource type."""

    __tablename__ = "resource"
    __mapper_args__ = {"polymorphic_on": "type"}  # noqa: RUF012 - as declarative mappings are written

    tenant_id: Mapped[str] = mapped_column(Text, primary_key=True)
    type: Mapped[str] = mapped_column(Text, primary_key=True)
    id: Mapped[str] = mapped_column(Text, primary_key=True)
    version: Mapped[int]
    content: Mapped[str] = mapped_column(Text)


@cache
def class_of(resource_type: str) -> type[Resource]:
    """Return the mapped class of a FHIR type, made when it is first asked for."""
    return type(resource_type, (Resource,), {"__mapper_args__": {"polymorphic_identity": resource_type}})


def track_types(manager: SyncManager, types: Iterable[str]) -> None:
    """Have the manager record every change of these types."""
    for resource_type in types:
        entity = class_of(resource_type)
        manager.track(
            entity,
            resource_type=resource_type,
            tenant=entity.tenant_id,
            resource_id=entity.id,
            content=lambda row: row.content,
            version=lambda row: row.version,
            fhir_version="4.0",
        )


def read_sample(source: Path | None) -> list[FhirResource]:
    """Return resources of the most frequent types under `source` (None: the shipped subset), at most 500.

    What is too large for a demo, or no event could carry exactly, is left out. Raises `SettingsError` when what remains
    is too little to play with.
    """
    try:
        resources = load(source)
    except FileNotFoundError as error:
        raise SettingsError("data", str(error)) from None
    found = {
        (each.resource_type, each.resource_id): each
        for each in islice(resources, _MOST_READ)
        if len(each.text) <= _MOST_BYTES and _can_be_carried(each)
    }
    frequent = {name for name, _ in Counter(name for name, _ in found).most_common(_TYPES)}
    sample = [each for each in found.values() if each.resource_type in frequent][:_MOST]
    if len(sample) < _LEAST:
        raise SettingsError("data", f"{source} has {len(sample)} resources to show, and the demo needs {_LEAST}")
    return sample


def new_rows(tenant_id: str, resources: Sequence[FhirResource]) -> list[Resource]:
    """Return rows that hold these resources for a clinic, in their first version."""
    return [
        class_of(each.resource_type)(tenant_id=tenant_id, id=each.resource_id, version=1, content=each.text)
        for each in resources
    ]


def revised(content: str, version: int, resource_id: str | None = None) -> str:
    """Return the resource in its next version; everything but `meta`, and `id` if given, stays to the letter."""
    fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    meta = msgspec.json.decode(fields.get("meta", b"{}"), type=dict[str, msgspec.Raw])
    meta["versionId"] = _raw(str(version))
    meta["lastUpdated"] = _raw(datetime.now(UTC).isoformat(timespec="milliseconds"))
    fields["meta"] = _raw(meta)
    if resource_id is not None:
        fields["id"] = _raw(resource_id)
    return msgspec.json.encode(fields).decode()


class Life:
    """What two clinics do all day, drawn from a seed: revise, add, remove, and now and then change their mind."""

    def __init__(self, manager: SyncManager, sample: Sequence[FhirResource], seed: int) -> None:
        self.alive: list[Key] = [
            (tenant, each.resource_type, each.resource_id) for tenant in TENANTS for each in sample
        ]
        self.revised: dict[Key, int] = {}
        self.added: list[Key] = []
        self.removed: list[Key] = []
        self.undone: list[Key] = []
        self.transactions = 0
        self._manager = manager
        self._sample = sample
        self._random = random.Random(seed)
        self._new = 0

    async def go_on(self) -> None:
        """Run one transaction; about one in ten is rolled back after its rows and events were written."""
        self.transactions += 1
        choice = self._random.random()
        if choice < 0.1:
            await self._change_mind()
        elif choice < 0.2:
            await self._add()
        elif choice < 0.27:
            await self._remove()
        else:
            await self._revise(self._random.randint(1, 3))

    def some_revised(self, count: int) -> list[Key]:
        """Return resources that were changed since they were loaded and are still there."""
        alive = set(self.alive)
        return [key for key in self.revised if key in alive][:count]

    async def _revise(self, count: int) -> None:
        keys = self._random.sample(self.alive, count)
        async with self._manager.session() as session, session.begin():
            for key in keys:
                row = await _get(session, key)
                row.version += 1
                row.content = revised(row.content, row.version)
        for key in keys:
            self.revised[key] = self.revised.get(key, 0) + 1

    async def _add(self) -> None:
        row = self._newcomer()
        key = (row.tenant_id, row.type, row.id)
        async with self._manager.session() as session, session.begin():
            session.add(row)
        self.alive.append(key)
        self.added.append(key)

    async def _remove(self) -> None:
        at = self._random.randrange(len(self.alive))
        self.alive[at], self.alive[-1] = self.alive[-1], self.alive[at]
        key = self.alive.pop()
        async with self._manager.session() as session, session.begin():
            await session.delete(await _get(session, key))
        self.removed.append(key)

    async def _change_mind(self) -> None:
        row = self._newcomer()
        self.undone.append((row.tenant_id, row.type, row.id))
        async with self._manager.session() as session:
            session.add(row)
            existing = await _get(session, self._random.choice(self.alive))
            existing.content = revised(existing.content, existing.version + 1)
            await session.flush()
            await session.rollback()

    def _newcomer(self) -> Resource:
        self._new += 1
        like = self._random.choice(self._sample)
        new_id = f"new-{self._new}"
        return class_of(like.resource_type)(
            tenant_id=self._random.choice(TENANTS),
            type=like.resource_type,
            id=new_id,
            version=1,
            content=revised(like.text, 1, new_id),
        )


async def _get(session: AsyncSession, key: Key) -> Resource:
    return await session.get_one(class_of(key[1]), key)


def _can_be_carried(resource: FhirResource) -> bool:
    try:
        SyncEvent.create(resource.resource_type, resource.resource_id, resource.text)
    except InvalidEvent:
        return False
    return True


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
