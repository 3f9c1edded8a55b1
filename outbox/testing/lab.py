"""The failure lab: crash, duplicate, reorder, expire and break around your secondary, then see whether it converged.

A real relay on a real PostgreSQL carries the same small history once for each scenario, each in a tenant of its own.
What must be there in the end is what the primary says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import SettingsError
from outbox.secondaries.base import Secondary
from outbox.testing.lab_ending import Difference, Read, differences, not_done
from outbox.testing.lab_ground import Ground
from outbox.testing.lab_scenarios import SCENARIOS, Scenario, outage
from outbox.testing.relay import StillOwed

__all__ = ["Diverged", "FailureLab"]

_SHOWN = 20


class Diverged(AssertionError):
    """The secondary does not equal the primary; `differences` says after which scenario, where and how."""

    def __init__(self, backend_id: str, found: Sequence[Difference], ran: Sequence[str]) -> None:
        self.differences = tuple(found)
        failed = len({each.scenario for each in found})
        lines = [*map(str, found[:_SHOWN])]
        if len(found) > _SHOWN:
            lines.append(f"and {len(found) - _SHOWN} more")
        super().__init__("\n  ".join([f"{backend_id}: {failed} of {len(ran)} scenarios failed", *lines]))


class FailureLab:
    """Runs every scenario against a secondary. `engine` is on a database with the outbox tables that nobody else uses.

    Its pool is emptied after every check.
    `within` is how long one step of a scenario may take to converge; only a secondary that stays unavailable needs it.
    """

    def __init__(self, engine: AsyncEngine, *, within: timedelta = timedelta(seconds=60)) -> None:
        self._engine = engine
        self._within = within

    async def check(
        self,
        secondary: Secondary,
        *,
        read: Read | None = None,
        away: Callable[[], AbstractAsyncContextManager[object]] | None = None,
        only: Collection[str] | None = None,
    ) -> list[str]:
        """Run every scenario and return their names; raise `Diverged` when the secondary differs after any of them.

        `only` names some of them; raises `SettingsError` for a name that is none.

        Compares by `scan`, and by `find` where there is one; given `read` (tenant, type, id: what is there now, as
        JSON text or decoded, None when nothing is) by that alone. `away` gives a context manager inside which the
        secondary's server cannot be reached; with it an outage is a scenario too. What `scan`, `find` and `read`
        raise passes through. The secondary is written to and not closed.
        """
        scenarios = _chosen(SCENARIOS if away is None else (*SCENARIOS, outage(away)), only)
        try:
            ran, found = await self._run_all(scenarios, secondary, read)
        finally:
            # Connections belong to this event loop; the next check may be in another.
            await self._engine.dispose()
        if found:
            raise Diverged(secondary.backend_id, found, ran)
        return ran

    async def _run_all(
        self, scenarios: Sequence[Scenario], secondary: Secondary, read: Read | None
    ) -> tuple[list[str], list[Difference]]:
        found: list[Difference] = []
        ran: list[str] = []
        for scenario in scenarios:
            ran.append(_name(scenario))
            found += await self._run(scenario, secondary, read)
            # Whatever differs without any fault differs after every other as well.
            if found and scenario is SCENARIOS[0]:
                break
        return ran, found

    async def _run(self, scenario: Scenario, secondary: Secondary, read: Read | None) -> list[Difference]:
        name = _name(scenario)
        async with Ground(name, self._engine, secondary, self._within) as ground:
            try:
                await scenario(ground)
                dead = await ground.carry()
            except StillOwed as owed:
                return [Difference(name, secondary.backend_id, "everything done", str(owed))]
            return [*not_done(name, dead), *await differences(name, ground, read)]


def _chosen(scenarios: Sequence[Scenario], only: Collection[str] | None) -> list[Scenario]:
    names = {_name(each) for each in scenarios}
    if unknown := {*(only or ())} - names:
        raise SettingsError("only", f"no scenario is called {min(unknown)!r}; there are {', '.join(sorted(names))}")
    return [each for each in scenarios if only is None or _name(each) in only]


def _name(scenario: Scenario) -> str:
    return scenario.__name__.replace("_", " ")
