"""Reconcile: prove that a secondary equals the primary, and restore it through the outbox where it does not.

`compare` names suspects, `judge` tells which of them are drift, `repair` records the events that restore them; this
holds them together, bounded in memory, and writes down what came of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.compare import Comparison
from outbox.errors import UnknownSecondary
from outbox.judge import Drift, Judge, Patience
from outbox.primary import code_of
from outbox.repair import Repairer
from outbox.secondaries.base import Listable, Secondary
from outbox.source import Source
from outbox.statement import Statement

__all__ = ["NOTE", "TERMS", "ReconciliationResult", "SyncReconciler", "Terms"]

_log = logging.getLogger("outbox.reconcile")

TERMS = Statement("""
select tenant_ids, resource_types from {schema}.outbox_secondary where backend_id = :backend_id
""")

NOTE = Statement("""
insert into {schema}.outbox_reconciliation
    (backend_id, tenant_id, resource_type, repair, actor, reason, high_water, primary_count, secondary_count, missing,
     extra, stale, altered, in_flight, repaired, refused, started_at)
values
    (:backend_id, :tenant_id, :resource_type, :repair, :actor, :reason, :high_water, :primary_count, :secondary_count,
     :missing, :extra, :stale, :altered, :in_flight, :repaired, :refused, :started_at)
""")

_Scope = tuple[str, str]
_KINDS = ("missing", "extra", "stale", "altered")
_COUNTS = ("primary_count", "secondary_count", *_KINDS, "in_flight", "repaired", "refused")
_SAMPLES = 10
_TOGETHER = 500
# What a role that may only read, or a server that does, answers to the note.
_MAY_NOT_WRITE = ("42501", "25006")


class Terms(msgspec.Struct, frozen=True):
    """How a comparison is done, and for whom.

    `patience`: how long, for each tenant and type, deliveries under way are waited for before what they carry is left
    out as in flight. `most_deletes`: repair deletes extras only while they are no more than this share of what the
    secondary holds (never fewer than ten), of a tenant and type and of all that was compared, and no more than
    `most_deleted`; so that a wrong or empty listing empties nothing, not even many small tenants one by one. `actor`
    and `reason` are written down with every repair.
    """

    patience: timedelta = timedelta(seconds=30)
    most_deletes: float = 0.05
    most_deleted: int = 10_000
    actor: str = ""
    reason: str = ""


class ReconciliationResult(msgspec.Struct):
    """What a comparison found: exact counts, the first ten of each kind as `samples`.

    `in_flight` counts resources that differed only because a delivery was under way or failed, or because a write came
    in between; `in_flight_why` says which. `repaired` counts repair events recorded; `refused` extras left alone as too
    many looked deletable. Whatever was recorded up to position `high_water` was taken into account. `listed` is of how
    many resources the content was read, the others being equal in sum.
    """

    backend_id: str
    primary_count: int = 0
    secondary_count: int = 0
    missing: int = 0
    extra: int = 0
    stale: int = 0
    altered: int = 0
    in_flight: int = 0
    repaired: int = 0
    refused: int = 0
    listed: int = 0
    high_water: int = 0
    started_at: datetime | None = None
    duration: timedelta = timedelta(0)
    in_flight_why: dict[str, int] = msgspec.field(default_factory=dict)
    samples: list[Drift] = msgspec.field(default_factory=list)

    @property
    def in_sync(self) -> bool:
        """Whether nothing is missing, extra, stale or altered."""
        return not (self.missing or self.extra or self.stale or self.altered)

    @property
    def rate(self) -> float:
        """Resources of the larger side per second."""
        return max(self.primary_count, self.secondary_count) / max(self.duration.total_seconds(), 1e-6)

    def count(self, drifts: Sequence[Drift]) -> None:
        """Add what some suspects showed."""
        for drift in drifts:
            setattr(self, drift.kind, getattr(self, drift.kind) + 1)
            if sum(sample.kind == drift.kind for sample in self.samples) < _SAMPLES:
                self.samples.append(drift)

    def set_aside(self, others: dict[str, int]) -> None:
        """Add suspects that turned out to be none."""
        for why, number in others.items():
            self.in_flight += number
            self.in_flight_why[why] = self.in_flight_why.get(why, 0) + number


async def _at_once() -> None:
    """Pause for nothing."""


class SyncReconciler:
    """Compares one secondary with the primary. It reads both sides and writes outbox events and a note, nothing else.

    `pause` is awaited between pages: whoever wants to be slow sleeps there.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        source: Source,
        secondary: Secondary,
        schema: str,
        terms: Terms | None = None,
        pause: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        self._engine = engine
        self._source = source
        self._secondary = secondary
        self._schema = schema
        self._terms = terms or Terms()
        self._pause = pause

    async def reconcile(
        self, tenant_id: str | None = None, resource_type: str | None = None, *, repair: bool = False
    ) -> ReconciliationResult:
        """Compare every tenant and type, or the given ones; with `repair`, record an event for each that differs.

        Repair reads the primary's row under lock and owes the event to this secondary only. Raises `UnknownSecondary`
        when the registry does not have the secondary, and `Unavailable` when a side cannot be read to its end.
        """
        started = time.monotonic()
        result = ReconciliationResult(self._secondary.backend_id)
        scopes = await self._scopes(tenant_id, resource_type)
        result.started_at, result.high_water = await self._judge().position()
        removable = [(scope, await self._reconcile(scope, result, repair=repair)) for scope in scopes]
        if repair:
            await self._remove(removable, result)
        result.duration = timedelta(seconds=time.monotonic() - started)
        await self._note(result, {"tenant_id": tenant_id, "resource_type": resource_type, "repair": repair})
        return result

    async def _reconcile(self, scope: _Scope, result: ReconciliationResult, *, repair: bool) -> list[str]:
        """Compare one tenant and type; return the extras that repair may remove if they are few in all, too."""
        walk = Comparison(self._source, self._secondary, *scope, self._pause)
        judge, extras, removable = self._judge(), 0, list[str]()
        async for names in _together(walk.suspects()):
            verdict = await judge.judge(*scope, names)
            result.count(verdict.drifts)
            result.set_aside(verdict.others)
            if repair:
                others = [drift.resource_id for drift in verdict.drifts if drift.kind != "extra"]
                result.repaired += await self._repairer.restore(*scope, others)
                found = [drift.resource_id for drift in verdict.drifts if drift.kind == "extra"]
                extras += len(found)
                # Beyond that nothing is removed, and what cannot be is not kept.
                removable += found if result.extra <= self._terms.most_deleted else []
        result.primary_count += walk.primary_count
        result.secondary_count += walk.secondary_count
        result.listed += walk.listed
        if self._are_few(extras, walk.secondary_count):
            return removable
        result.refused += extras
        return []

    async def _remove(self, removable: Sequence[tuple[_Scope, list[str]]], result: ReconciliationResult) -> None:
        extras = result.extra - result.refused
        if not self._are_few(extras, result.secondary_count) or result.extra > self._terms.most_deleted:
            result.refused += extras
            return
        for scope, names in removable:
            result.repaired += await self._repairer.remove(*scope, names)

    def _are_few(self, extras: int, held: int) -> bool:
        return extras <= min(max(10, held * self._terms.most_deletes), self._terms.most_deleted)

    async def _scopes(self, tenant_id: str | None, resource_type: str | None) -> list[tuple[str, str]]:
        """Return the tenants and types of either side that this secondary is to hold."""
        async with self._engine.connect() as connection:
            rows = await connection.execute(text(TERMS.on(self._schema)), {"backend_id": self._secondary.backend_id})
            terms = rows.one_or_none()
        if terms is None:
            raise UnknownSecondary(self._secondary.backend_id, "the registry does not have it; a relay puts it there")
        found = await self._source.scopes(tenant_id, resource_type)
        if isinstance(self._secondary, Listable):
            found |= {scope for scope in await self._secondary.scopes() if scope[1] in self._source.resource_types}
        return sorted(
            (tenant, kind)
            for tenant, kind in found
            if tenant_id in (None, tenant)
            and resource_type in (None, kind)
            and (terms.tenant_ids is None or tenant in terms.tenant_ids)
            and (terms.resource_types is None or kind in terms.resource_types)
        )

    async def _note(self, result: ReconciliationResult, asked: dict[str, Any]) -> None:
        """Write down what came of it; whoever may only read the primary goes without."""
        counts = {name: getattr(result, name) for name in (*_COUNTS, "backend_id", "high_water", "started_at")}
        note = {**asked, **counts, "actor": self._terms.actor, "reason": self._terms.reason}
        try:
            async with self._engine.begin() as connection:
                await connection.execute(text(NOTE.on(self._schema)), note)
        except DBAPIError as error:
            if code_of(error.orig) not in _MAY_NOT_WRITE:
                raise
            _log.info("what came of it is not written down: this role may only read the primary")

    def _judge(self) -> Judge:
        return Judge(self._engine, self._schema, self._source, self._secondary, Patience(self._terms.patience))

    @property
    def _repairer(self) -> Repairer:
        terms = self._terms
        return Repairer(
            self._engine,
            self._schema,
            self._source,
            self._secondary.backend_id,
            actor=terms.actor or "reconcile",
            reason=terms.reason or "it differed",
            patience=terms.patience,
        )


async def _together(suspects: AsyncIterator[str]) -> AsyncIterator[list[str]]:
    names: list[str] = []
    async for name in suspects:
        names.append(name)
        if len(names) == _TOGETHER:
            yield names
            names = []
    if names:
        yield names
