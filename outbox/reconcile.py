"""Reconcile: prove that a secondary equals the primary, and restore it through the outbox where it does not.

`compare` names suspects, `judge` tells which of them are drift, `repair` records the events that restore them; this
holds them together, bounded in memory, and writes down what came of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.compare import Comparison
from outbox.errors import SettingsError, UnknownSecondary
from outbox.judge import Judge, Patience
from outbox.listing import closed
from outbox.primary import code_of
from outbox.reconciliation import ReconciliationResult, Standing, Terms
from outbox.repair import Repairer
from outbox.secondaries.base import Listable, Secondary
from outbox.source import Source
from outbox.statement import Statement

__all__ = ["NOTE", "TERMS", "SyncReconciler"]

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
_TOGETHER = 500
_TELL_EVERY = 1.0
# What a role that may only read, or a server that does, answers to the note.
_MAY_NOT_WRITE = ("42501", "25006")


async def _at_once() -> None:
    """Pause for nothing."""


async def _nobody(_: Standing) -> None:
    """Tell nobody."""


class SyncReconciler:
    """Compares one secondary with the primary. It reads both sides and writes outbox events and a note, nothing else.

    `pause` is awaited between pages: whoever wants to be slow sleeps there. `told` is awaited once a second or so.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        source: Source,
        secondary: Secondary,
        schema: str,
        terms: Terms | None = None,
        pause: Callable[[], Awaitable[None]] = _at_once,
        told: Callable[[Standing], Awaitable[None]] = _nobody,
    ) -> None:
        self._engine = engine
        self._source = source
        self._secondary = secondary
        self._schema = schema
        self._terms = terms or Terms()
        self._pause = pause
        self._told = told
        self._tell_at = 0.0

    async def reconcile(
        self,
        tenant_id: str | None = None,
        resource_type: str | None = None,
        *,
        repair: bool = False,
        standing: Standing | None = None,
    ) -> ReconciliationResult:
        """Compare every tenant and type, or the given ones; with `repair`, record an event for each that differs.

        Given a `standing`, goes on from there; what was found to be extra before that is then not repaired.
        Repair reads the primary's row under lock and owes the event to this secondary only. Raises `UnknownSecondary`
        when the registry does not have the secondary, and `Unavailable` when a side cannot be read to its end.
        """
        scopes = await self._scopes(tenant_id, resource_type)
        if standing is None:
            result = ReconciliationResult(self._secondary.backend_id)
            result.started_at, result.high_water = await self._judge().position()
        else:
            result = msgspec.structs.replace(standing.result)
            scopes = [scope for scope in scopes if scope >= standing.scope]
        started = time.monotonic() - result.duration.total_seconds()
        removable = []
        for scope in scopes:
            after = standing.after if standing is not None and scope == standing.scope else None
            removable.append((scope, await self._reconcile(scope, after, result, started, repair=repair)))
        if repair:
            await self._remove(removable, result)
        if result.uncarried:
            _log.warning("%s: %d of what differs no event can carry", result.backend_id, result.uncarried)
        result.duration = timedelta(seconds=time.monotonic() - started)
        await self._note(result, {"tenant_id": tenant_id, "resource_type": resource_type, "repair": repair})
        return result

    async def _reconcile(
        self, scope: _Scope, after: str | None, result: ReconciliationResult, started: float, *, repair: bool
    ) -> list[str]:
        """Compare one tenant and type; return the extras that repair may remove if they are few in all, too."""
        walk = Comparison(self._source, self._secondary, *scope, self._pause)
        judge, extras, removable, names = self._judge(), result.extra, list[str](), list[str]()
        async with closed(walk.walk(after)) as steps:
            async for name, differs in steps:
                if differs:
                    names.append(name)
                tells = not differs and time.monotonic() >= self._tell_at
                if len(names) == _TOGETHER or tells:
                    removable += await self._decide(judge, scope, names, result, repair=repair)
                    names = []
                if tells:
                    await self._tell(Standing(_with(result, walk, started), *scope, name))
        removable += await self._decide(judge, scope, names, result, repair=repair)
        result.primary_count += walk.primary_count
        result.secondary_count += walk.secondary_count
        result.listed += walk.listed
        extras = result.extra - extras
        if self._are_few(extras, walk.secondary_count):
            return removable
        result.refused += extras
        return []

    async def _decide(
        self, judge: Judge, scope: _Scope, names: Sequence[str], result: ReconciliationResult, *, repair: bool
    ) -> list[str]:
        """Judge suspects, and restore what is there; return those that are extra."""
        if not names:
            return []
        verdict = await judge.judge(*scope, names)
        result.count(verdict.drifts)
        result.set_aside(verdict.others)
        if not repair:
            return []
        others = [drift.resource_id for drift in verdict.drifts if drift.kind != "extra"]
        repairer = self._repairer
        result.repaired += await repairer.restore(*scope, others)
        result.uncarried += repairer.uncarried
        # Beyond that nothing is removed, and what cannot be is not kept.
        if result.extra > self._terms.most_deleted:
            return []
        return [drift.resource_id for drift in verdict.drifts if drift.kind == "extra"]

    async def _tell(self, standing: Standing) -> None:
        await self._told(standing)
        self._tell_at = time.monotonic() + _TELL_EVERY

    async def _remove(self, removable: Sequence[tuple[_Scope, list[str]]], result: ReconciliationResult) -> None:
        extras = result.extra - result.refused
        if not self._are_few(extras, result.secondary_count) or result.extra > self._terms.most_deleted:
            result.refused += extras
            return
        repairer = self._repairer
        for scope, names in removable:
            result.repaired += await repairer.remove(*scope, names)
        result.uncarried += repairer.uncarried

    def _are_few(self, extras: int, held: int) -> bool:
        return extras <= min(max(10, held * self._terms.most_deletes), self._terms.most_deleted)

    async def _scopes(self, tenant_id: str | None, resource_type: str | None) -> list[tuple[str, str]]:
        """Return the tenants and types of either side that this secondary is to hold."""
        async with self._engine.connect() as connection:
            rows = await connection.execute(text(TERMS.on(self._schema)), {"backend_id": self._secondary.backend_id})
            terms = rows.one_or_none()
        if terms is None:
            raise UnknownSecondary(self._secondary.backend_id, "the registry does not have it; a relay puts it there")
        types = self._source.resource_types
        if resource_type not in (None, *types):
            # To compare nothing and call it equal would be the worst answer.
            raise SettingsError("resource_type", f"{resource_type!r} is not tracked; tracked are {', '.join(types)}")
        found = await self._source.scopes(tenant_id, resource_type)
        if isinstance(self._secondary, Listable):
            found |= {scope for scope in await self._secondary.scopes() if scope[1] in types}
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


def _with(result: ReconciliationResult, walk: Comparison, started: float) -> ReconciliationResult:
    """Return what a result is with what a walk has seen so far."""
    return msgspec.structs.replace(
        result,
        primary_count=result.primary_count + walk.primary_count,
        secondary_count=result.secondary_count + walk.secondary_count,
        listed=result.listed + walk.listed,
        duration=timedelta(seconds=time.monotonic() - started),
    )
