"""Doctor: look at everything that is known to go wrong, and say what was found and what to do next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy.exc import DBAPIError

from outbox.doctor_secondaries import SECONDARY_CHECKS
from outbox.doctor_server import SERVER_CHECKS
from outbox.doctor_tables import TABLE_CHECKS, tables_there
from outbox.finding import Case, Check, Finding, Verdict, found_ok, found_unknown, found_wrong
from outbox.primary import PRIMARY_FAILED, code_of
from outbox.statement import Statement
from outbox.status import lag_text

__all__ = ["REACHED", "diagnose"]

# More would take from the application what the doctor is asked about.
_TOGETHER = 3
_BEYOND_ITS_OWN = timedelta(seconds=1)
_DENIED = "42501"

REACHED = Statement("select current_database() as name, current_user as role")


async def diagnose(case: Case) -> list[Finding]:
    """Return every finding, the primary's first. Never raises for what it finds, and waits for nobody for long.

    Each check has its own time, `health_timeout`: what hangs is unknown, and all others are answered.
    """
    findings = await _within("primary", _reached, case)
    if findings[0].verdict is not Verdict.OK:
        return findings
    there = await _within("schema", tables_there, case)
    whole = there[0].verdict is not Verdict.WRONG
    checks = SERVER_CHECKS | TABLE_CHECKS | SECONDARY_CHECKS if whole else SERVER_CHECKS
    room = asyncio.Semaphore(_TOGETHER)
    found = await asyncio.gather(*(_in_turn(room, name, check, case) for name, check in checks.items()))
    return [*findings, *there, *(finding for each in found for finding in each)]


async def _in_turn(room: asyncio.Semaphore, name: str, check: Check, case: Case) -> list[Finding]:
    async with room:
        return await _within(name, check, case)


async def _within(name: str, check: Check, case: Case) -> list[Finding]:
    """Return what a check finds; unknown when it takes too long or the primary refuses to say."""
    limit = case.config.health_timeout + _BEYOND_ITS_OWN
    asking = asyncio.ensure_future(_findings(name, check, case))
    try:
        done, _ = await asyncio.wait({asking}, timeout=limit.total_seconds())
    finally:
        # Not waited for: to close a connection to what hangs may hang too.
        asking.cancel()
    if done:
        return list(asking.result())
    return found_unknown(name, f"no answer within {lag_text(limit)}", "see what hangs, and ask again")


async def _findings(name: str, check: Check, case: Case) -> Sequence[Finding]:
    try:
        return await check(case)
    except PRIMARY_FAILED as error:
        code = code_of(error.orig if isinstance(error, DBAPIError) else error)
        if name == "primary":
            return found_wrong(name, f"does not answer or refuses ({code})", "is it running, and its address right?")
        said = "this role may not ask for it" if code == _DENIED else f"it could not be asked ({code})"
        return found_unknown(name, said, "ask as a role that may" if code == _DENIED else "ask again")


async def _reached(case: Case) -> Sequence[Finding]:
    database, role = await case.row(REACHED)
    return found_ok("primary", f"answers: database {database}, role {role}")
