"""A resource store that exists already, as a secondary: it learns to compare positions, the rest is here.

The guard is the store's. It keeps the position beside each resource, deleted ones included, and refuses an older one in
the step that writes, because two relays, one of them late, meet nowhere else. A store that forgets its deletes after a
while keeps the promise for that while. One that reads, compares and then writes keeps it only as long as no relay is
late; what slips through shows as drift in the next reconcile.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from outbox.content import encode_content
from outbox.errors import InvalidEvent, ResourceBusy, ResourceRefused, SettingsError, Unavailable
from outbox.event import StoredResource, SyncEvent
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Stale
from outbox.secondaries.reading import digest_of

__all__ = ["ResourceStorage", "ResourceStorageSecondary"]

_PAGE = 200
_ANSWERS: dict[bool, Outcome] = {True: Applied(), False: Stale()}
_NO_ANSWER = Retry("unknown_outcome", "the store answered neither true nor false")
_HUNG = Retry("timeout", "no answer about this resource in time, though the store answers")
# What the system says when it is the way to the store, or the store as a whole, that fails. Python has a
# `ConnectionError` for some of them only, and asyncio gives no number when several addresses failed.
_AWAY = frozenset(
    {
        None,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOSPC,
        errno.EROFS,
    }
)
# To be asked for; that it is not there is an answer.
_NOWHERE = ("outbox", "Check", "check")


class ResourceStorage(Protocol):
    """A store of resources by tenant, type and id.

    Writes answer whether they changed anything; absence is an answer, not an error. About one resource a store raises
    `ResourceBusy` (it may be taken later) or `ResourceRefused` (it never will be), about itself `Unavailable`. A
    `ConnectionError` says the same of the store, as do a name that does not resolve, a network without a way, a failed
    TLS handshake and a full disk; and so does a `TimeoutError`, unless the store still answers a read.
    What any other error was about is found out by trying again with fewer resources at a time.

    A secondary calls `create_or_update`, `delete`, `read` and `list`. It never calls `create`, which cannot be
    repeated, nor `count`, which proves nothing: they are the shape that such stores have.
    """

    async def create(
        self,
        tenant_id: str,
        resource_type: str,
        resource_id: str,
        content: str,
        position: int,
        *,
        version: str | None = None,
        fhir_version: str | None = None,
    ) -> bool:
        """Store a resource that is not there; False, and nothing changed, when it is, or was deleted later."""
        ...

    async def create_or_update(
        self,
        tenant_id: str,
        resource_type: str,
        resource_id: str,
        content: str,
        position: int,
        *,
        version: str | None = None,
        fhir_version: str | None = None,
    ) -> bool:
        """Store the whole new state, exact JSON text, unless `position` is not above the one held; then False.

        The one held may be that of a delete. What has none was written before the store was a secondary, and yields.
        """
        ...

    async def read(self, tenant_id: str, resource_type: str, resource_id: str) -> StoredResource | None:
        """Return a live resource; None when it is absent or deleted."""
        ...

    async def delete(self, tenant_id: str, resource_type: str, resource_id: str, position: int) -> bool:
        """Remove a resource and remember `position` in its place, unless it is not above the one held; then False.

        What is absent leaves its position too, and is True: a late create must find it.
        """
        ...

    async def count(self, tenant_id: str, resource_type: str | None = None) -> int:
        """Return how many live resources there are, of one type or of all."""
        ...

    async def list(self, tenant_id: str, resource_type: str, after: str, limit: int) -> Sequence[StoredResource]:
        """Return up to `limit` live resources with an id above `after`, in the order of the id's UTF-8 bytes.

        An `after` of "" is before every id. Only an empty page says that there are no more.
        """
        ...


class ResourceStorageSecondary:
    """Keeps a `ResourceStorage` in step, up to `concurrency` resources at a time.

    The store is yours to open and close, and so are its time limits; the relay's deadline bounds every batch. Raises
    `SettingsError` for a concurrency below one.
    """

    def __init__(self, storage: ResourceStorage, backend_id: str, *, concurrency: int = 8) -> None:
        if concurrency < 1:
            raise SettingsError("concurrency", "must be one or more")
        self.backend_id = backend_id
        self._storage = storage
        self._concurrency = concurrency

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Upsert or delete each resource, under the event's id whatever the content says.

        Raises `Unavailable`, with what is known by then, when the store is not there. An error that it did not explain
        is raised as it is.
        """
        outcomes: dict[int, Outcome] = {}
        try:
            await self._carry(batch, outcomes)
        except Unavailable as error:
            error.known = [outcomes.get(index) for index in range(len(batch))]
            raise
        return [outcomes[index] for index in range(len(batch))]

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield the live resources in id order, from one listing for every 200 of them.

        Raises `Unavailable` when a page fails, and when it is out of order, as that may hide what it left out.
        """
        last = after or ""
        while page := await self._page(tenant_id, resource_type, last):
            # Digests of large contents take long enough to keep the loop from its heartbeats.
            for seen in await asyncio.to_thread(_digests, page):
                yield seen
            last = page[-1].resource_id

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        """Return those of the resources that are live, each by a read of its own, several at a time.

        Raises `Unavailable` when one of the reads fails.
        """
        found: list[ResourceDigest] = []
        rest = deque(dict.fromkeys(resource_ids))
        hands = range(min(self._concurrency, len(rest)))
        if hands:
            await _finish([asyncio.create_task(self._look(tenant_id, resource_type, rest, found)) for _ in hands])
        return found

    async def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted. Raises `Unavailable`."""
        found = await self._read(tenant_id, resource_type, resource_id)
        return None if found is None or not _lives(found) else _text(found)

    async def check(self) -> None:
        """Return when the store answers a read; raise `Unavailable` when it does not."""
        with _reading():
            await self._storage.read(*_NOWHERE)

    async def _carry(self, batch: Sequence[SyncEvent], outcomes: dict[int, Outcome]) -> None:
        """Apply the batch with several hands that take the next event as soon as they are free."""
        rest = deque(enumerate(batch))
        hands = range(min(self._concurrency, len(batch)))
        if hands:
            await _finish([asyncio.create_task(self._take(rest, outcomes)) for _ in hands])

    async def _take(self, rest: deque[tuple[int, SyncEvent]], outcomes: dict[int, Outcome]) -> None:
        while rest:
            index, event = rest.popleft()
            try:
                outcomes[index] = await self._outcome(event)
            finally:
                if index not in outcomes:
                    # Nobody begins another; what is under way may end, or its outcome would be unknown.
                    rest.clear()

    async def _outcome(self, event: SyncEvent) -> Outcome:
        try:
            return _ANSWERS.get(await self._send(event), _NO_ANSWER)
        except ResourceBusy as error:
            return Retry(error.code, error.problem, error.retry_after)
        except ResourceRefused as error:
            return Rejected(error.code, error.problem)
        except TimeoutError:
            await self.check()
            return _HUNG
        except OSError as error:
            if not _is_away(error):
                raise
            raise _unreachable() from None

    async def _send(self, event: SyncEvent) -> bool:
        assert event.position is not None, "only a recorded event has a position to compare"
        if event.content is None:
            return await self._storage.delete(*event.key, event.position)
        return await self._storage.create_or_update(
            *event.key, event.content, event.position, version=event.version, fhir_version=event.fhir_version
        )

    async def _look(self, tenant_id: str, resource_type: str, rest: deque[str], found: list[ResourceDigest]) -> None:
        try:
            while rest:
                resource = await self._read(tenant_id, resource_type, rest.popleft())
                found += [] if resource is None else await asyncio.to_thread(_digests, [resource])
        finally:
            # Once one has failed, nobody begins another.
            rest.clear()

    async def _read(self, tenant_id: str, resource_type: str, resource_id: str) -> StoredResource | None:
        with _reading():
            return await self._storage.read(tenant_id, resource_type, resource_id)

    async def _page(self, tenant_id: str, resource_type: str, after: str) -> Sequence[StoredResource]:
        with _reading():
            page = await self._storage.list(tenant_id, resource_type, after, _PAGE)
        last = after.encode()
        for resource in page:
            if (found := resource.resource_id.encode()) <= last:
                raise Unavailable("out_of_order", "the store's listing is not in the byte order of its ids")
            last = found
        return page


async def _finish(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait for all, and raise what one raised; when we are cancelled, end them first: nobody writes behind us."""
    try:
        # In a task group, an error that a driver makes of a cancellation would take the cancellation's place.
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        task.result()


@contextmanager
def _reading() -> Iterator[None]:
    """A read has no outcome of its own: when it cannot be answered, the store is unavailable."""
    try:
        yield
    except ResourceBusy as error:
        raise Unavailable(error.code, error.problem, retry_after=error.retry_after) from None
    except TimeoutError:
        raise Unavailable("timeout", "the store did not answer a read in time") from None
    except OSError as error:
        if not _is_away(error):
            raise
        raise _unreachable() from None


def _is_away(error: OSError) -> bool:
    """Say whether an error is about the store, and not about one resource, such as a name that is too long."""
    return isinstance(error, (ConnectionError, socket.gaierror, ssl.SSLError)) or error.errno in _AWAY


def _unreachable() -> Unavailable:
    return Unavailable("unreachable", "the store lost its connection, or found none")


def _lives(resource: StoredResource) -> bool:
    return resource.deleted_at is None and resource.content is not None


def _text(resource: StoredResource) -> str:
    content = resource.content or ""
    return content if isinstance(content, str) else encode_content(content)


def _digests(page: Sequence[StoredResource]) -> list[ResourceDigest]:
    return [ResourceDigest(each.resource_id, each.position or 0, _digest(each)) for each in page if _lives(each)]


def _digest(resource: StoredResource) -> str:
    try:
        return digest_of(_text(resource))
    except InvalidEvent:
        return ""
