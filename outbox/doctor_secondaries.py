"""Doctor, secondaries: whether the registry says what the manager says, and whether each is there and gets its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from outbox.ahead import highest_positions
from outbox.dispatch import answers
from outbox.errors import Unavailable
from outbox.finding import Case, Check, Finding, Verdict, found_ok, found_unknown, found_warning, found_wrong
from outbox.lanes import HIGHEST
from outbox.register import Registration
from outbox.secondaries.base import Checkable
from outbox.settings import SyncMode
from outbox.statement import Statement
from outbox.status import BackendSyncStatus, statuses

__all__ = ["REGISTERED", "SECONDARY_CHECKS"]

_NOT_NAMED = "no manager is named, so the secondaries themselves were not asked"
_NAME_IT = "outbox doctor --app module:manager, or --config FILE"

REGISTERED = Statement("""
select backend_id, role, mode, ordering, tenant_ids, resource_types, status
from {schema}.outbox_secondary
order by backend_id
""")

# What of a status says whether each of these is as it should be, and what to do when it is not.
_TOLD = {
    "relay": ("silence", "a relay looks after all", "start one: outbox relay; if one runs, look at its log"),
    "breaker": ("breaker", "every breaker is closed", "mend the secondary; the relay finds that out by itself"),
    "attempts": ("attempts", "the latest attempts went well", "look at `outbox failures` and the relay's log"),
    "drift": ("drift", "nothing differed when last compared", "outbox reconcile NAME, then the same with --repair"),
    "dead": ("dead", "no key is dead", "mend the cause, then outbox failures redrive"),
    "lag": ("lag", "nobody is further behind than allowed", "more relays, or a faster secondary"),
    "pending": ("pending", "no more is owed than allowed", "more relays, a larger batch_size, or a faster secondary"),
}


async def _registry(case: Case) -> Sequence[Finding]:
    known = {name: (terms, status) for name, *terms, status in await case.rows(REGISTERED)}
    if not case.registrations:
        return found_unknown("registry", f"{_NOT_NAMED}; registered are {', '.join(known) or 'none'}", _NAME_IT)
    configured = {each.backend_id: each for each in case.registrations}
    missing = [name for name in configured if name not in known]
    unknown = [name for name, (_, status) in known.items() if name not in configured and status != "removed"]
    differing = [name for name, each in configured.items() if name in known and known[name][0] != _terms(each)]
    removed = [name for name in configured if name in known and known[name][1] in ("draining", "removed")]
    findings: list[Finding] = []
    if missing:
        said = f"not registered: {', '.join(missing)}; nothing is recorded for them"
        findings += found_wrong("registry", said, "start a relay, or await manager.register(); then outbox backfill")
    if unknown:
        said = f"registered, and not of this manager: {', '.join(unknown)}; somebody must carry to them"
        findings += found_warning("registry", said, "; ".join(f"add it, or outbox remove {name}" for name in unknown))
    if differing:
        said = f"other terms than the registry has: {', '.join(differing)}"
        findings += found_warning("registry", said, "a relay writes this manager's when it starts: is that wanted?")
    if removed:
        said = f"of this manager, and leaving or removed: {', '.join(removed)}"
        findings += found_warning("registry", said, "take them out of the manager")
    return findings or found_ok("registry", f"says what the manager says: {', '.join(configured)}")


def _terms(each: Registration) -> list[object]:
    lists = [None if names is None else list(names) for names in (each.tenant_ids, each.resource_types)]
    return [each.role, str(each.mode or SyncMode.ASYNCHRONOUS), each.ordering, *lists]


async def _reachable(case: Case) -> Sequence[Finding]:
    if not case.registrations:
        return found_unknown("reachable", _NOT_NAMED, _NAME_IT)
    found = await asyncio.gather(*(_reached(each, case) for each in case.registrations))
    return [finding for findings in found for finding in findings]


async def _reached(registration: Registration, case: Case) -> Sequence[Finding]:
    name, secondary = registration.backend_id, registration.secondary
    if not isinstance(secondary, Checkable):
        return found_unknown("reachable", f"{name} has no way to be asked")
    try:
        await answers(secondary, case.config.health_timeout)
    except Unavailable as error:
        return found_wrong(
            "reachable", f"{name} does not answer ({error.code})", "is it running, and its address right?"
        )
    return found_ok("reachable", f"{name} answers")


async def _ahead(case: Case) -> Sequence[Finding]:
    if not case.registrations:
        return found_unknown("ahead", _NOT_NAMED, _NAME_IT)
    positions = await highest_positions(case.registrations, case.config.health_timeout)
    # Asked in this order: what is there by now was given before.
    (given,) = await case.row(HIGHEST)
    held_back = {each.backend_id: each.beyond for each in await statuses(case.engine, case.config)}
    furthest = {name: max(held or 0, held_back.get(name) or 0) for name, held in positions.items()}
    if ahead := [f"{name} ({furthest[name]:,})" for name in furthest if furthest[name] > given or held_back.get(name)]:
        said = (
            f"the primary has given {given:,} positions, and these were further: {', '.join(ahead)}; history went back"
        )
        return found_wrong("ahead", said, "outbox doctor --repair; it says what to reconcile then")
    silent = [name for name, held in positions.items() if held is None]
    if silent:
        return found_unknown("ahead", f"did not or cannot say how far they are: {', '.join(silent)}")
    return found_ok("ahead", f"none holds a position above {given:,}, the highest that was given")


def _told(name: str) -> Check:
    word, well, advice = _TOLD[name]

    async def check(case: Case) -> Sequence[Finding]:
        found = await statuses(case.engine, case.config)
        said = [
            Finding(name, _gravity(each), f"{each.backend_id}: {reason}", advice)
            for each in found
            for reason in _about(word, each)
        ]
        return said or found_ok(name, well)

    return check


def _about(word: str, status: BackendSyncStatus) -> list[str]:
    return [reason for reason in status.reasons if reason.startswith(word)]


def _gravity(status: BackendSyncStatus) -> Verdict:
    # Nobody relies on a shadow yet.
    return Verdict.WARNING if status.status == "shadow" else Verdict.WRONG


async def _paused(case: Case) -> Sequence[Finding]:
    if paused := [each.backend_id for each in await statuses(case.engine, case.config) if each.status == "paused"]:
        return found_warning(
            "paused",
            f"paused: {', '.join(paused)}; what is owed grows",
            "; ".join(f"outbox resume {name}" for name in paused),
        )
    return found_ok("paused", "none is paused")


SECONDARY_CHECKS: dict[str, Check] = {
    "registry": _registry,
    "reachable": _reachable,
    "ahead": _ahead,
    "paused": _paused,
    **{name: _told(name) for name in _TOLD},
}
"""By the name of their findings; they need the tables."""
