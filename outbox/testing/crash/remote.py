"""Remote: the adapter by which relays reach the secondaries of a run, which live in a process of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

from outbox.errors import Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Stale
from outbox.testing.crash.observed import attempt_in_hand
from outbox.testing.crash.terms import SPARED
from outbox.testing.crash.wire import Request, ask
from outbox.testing.history import History
from outbox.testing.records import Fired

__all__ = ["DEADLY", "POISON", "RemoteSecondary"]

#: What content has that no secondary takes, and what it has that kills whoever hands it over.
POISON = '"poison"'
DEADLY = '"deadly"'

_OUTCOMES: dict[str, Outcome] = {
    "applied": Applied(),
    "stale": Stale(),
    "retry": Retry("busy"),
    "refused": Retry("shard_lost", blameless=True),
    "rejected": Rejected("poison"),
}


class RemoteSecondary:
    """One of the secondaries, as a process that may be killed sees it."""

    def __init__(self, backend_id: str, path: str, caller: str, history: History | None = None) -> None:
        self._backend_id = backend_id
        self._path = path
        self._caller = caller
        self._history = history

    @property
    def backend_id(self) -> str:
        """The name in the registry."""
        return self._backend_id

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Hand a batch over and translate the answer."""
        if any(DEADLY in (event.content or "") for event in batch):
            self._die()
        events = [(event.position or 0, *event.key, event.content) for event in batch]
        answer = await self._ask(asks="apply", attempt_id=attempt_in_hand.get(), events=events)
        if after := answer.get("after"):
            raise Unavailable("throttled", "the secondary is busy", retry_after=timedelta(seconds=after))
        return [_OUTCOMES[each] for each in answer["outcomes"]]

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield the live resources in id order."""
        found = [
            ResourceDigest(name, position, digest)
            for position, *scope, name, digest in await self._contents()
            if scope == [tenant_id, resource_type] and (after is None or name.encode() > after.encode())
        ]
        for each in sorted(found, key=lambda each: each.resource_id.encode()):
            yield each

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        """Return those of the resources that are live."""
        wanted = set(resource_ids)
        return [each async for each in self.scan(tenant_id, resource_type) if each.resource_id in wanted]

    async def scopes(self) -> Sequence[tuple[str, str]]:
        """Return every (tenant_id, resource_type) with a live resource."""
        return sorted({(tenant_id, kind) for _, tenant_id, kind, _, _ in await self._contents()})

    async def check(self) -> None:
        """Return when the secondary answers."""
        await self._ask(asks="check")

    async def highest_position(self) -> int:
        """Return the highest position it holds."""
        return int((await self._ask(asks="highest"))["position"])

    def _die(self) -> None:
        if self._caller.startswith(SPARED):
            raise RuntimeError("deadly to others")
        if self._history is not None:
            self._history.write(Fired(fault="deadly", against=self._caller))
        os.kill(os.getpid(), signal.SIGKILL)

    async def _contents(self) -> Any:
        return await self._ask(asks="contents")

    async def _ask(self, **terms: Any) -> Any:
        try:
            return await ask(self._path, Request(backend_id=self._backend_id, caller=self._caller, **terms))
        except (OSError, EOFError) as error:
            raise Unavailable("refused", type(error).__name__) from None
