"""Valkey or Redis as a secondary: a hash for every resource, and a sorted set of ids for every tenant and type.

A batch is one script in one round trip, so nobody ever sees half of an event. A delete leaves a hash with a position
and without content, which expires: `tombstones_for` must outlast the longest time that an event can be under way.

Keys are `prefix:tenant:type:id` and `prefix:tenant:type`, with `%` and `:` escaped inside the parts, and
`prefix:%highest`, where the script keeps the highest position it has written. A cluster spreads them over slots, where
no script reaches them all, unless the prefix is a hash tag such as `{outbox}`. The server must not evict
(`maxmemory-policy noeviction`); what it evicts, or loses in a restart, the next reconcile finds missing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import unquote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry as Again
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE
from redis.exceptions import NoScriptError, RedisError

from outbox.errors import SettingsError, Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, ResourceDigest, Retry, Stale
from outbox.secondaries.reading import digest_of
from outbox.secondaries.valkey_failure import code_of
from outbox.secondaries.valkey_script import APPLY, APPLY_SHA, HIGHEST, RAISE, position_of, values_of

__all__ = ["ValkeySecondary"]

_PREFIX = re.compile(r"[A-Za-z0-9_.-]+|\{[A-Za-z0-9_.-]+\}")
_PAGE = 200
# A script holds up every other client of the server; this much takes a few milliseconds.
_BYTES_AT_ONCE = 4 * 1024 * 1024
_EVENTS_AT_ONCE = 1_000
_KEYS_AT_ONCE = 1_000
_ANSWERS: dict[int, Outcome] = {
    1: Applied(),
    0: Stale(),
    -1: Retry("WRONGTYPE", "another hand's key stands where this resource belongs"),
}
_UNKNOWN = Retry("unknown_outcome", "the server answered in other words than the script's")
# Answers stay bytes, whatever the client was told to do with them.
_BYTES: dict[str, Any] = {NEVER_DECODE: True}


class ValkeySecondary:
    """Keeps the newest state of every resource in Valkey or Redis.

    `client_or_url` is a `redis.asyncio.Redis`, which stays yours to close, or a URL such as `redis://host:6379/0`.
    `timeout` bounds one `apply`, and one page of a `scan`. Raises `SettingsError` for a prefix other than letters,
    digits, `_`, `.`, `-`, all of it in braces or not, and for tombstones that would not live a second.
    """

    def __init__(
        self,
        backend_id: str,
        client_or_url: Redis | str,
        prefix: str = "outbox",
        *,
        tombstones_for: timedelta = timedelta(days=7),
        timeout: timedelta = timedelta(seconds=30),
    ) -> None:
        if not _PREFIX.fullmatch(prefix):
            raise SettingsError("prefix", "takes ASCII letters, digits, '_', '.', '-', all of it in braces or not")
        if tombstones_for < timedelta(seconds=1):
            raise SettingsError("tombstones_for", "must be a second or more")
        self.backend_id = backend_id
        self._prefix = prefix
        # No part of another key holds a `%` that is not an escape.
        self._highest = f"{prefix}:%highest".encode()
        self._owned = not isinstance(client_or_url, Redis)
        self._client = client_or_url if isinstance(client_or_url, Redis) else _connect(client_or_url)
        # It has no annotations of its own.
        self._execute: Callable[..., Awaitable[Any]] = self._client.execute_command
        self.tombstones_for = tombstones_for
        self._timeout = timeout.total_seconds()

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Run one script for the batch, or one for every 4 MiB of it. Raises `Unavailable` for all that goes wrong."""
        outcomes: list[Outcome] = []
        async with self._working():
            for part in _parts(batch):
                outcomes += await self._apply(part)
        return outcomes

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield the live resources in id order, with two round trips for every 200 of them."""
        index = self._key(tenant_id, resource_type)
        lowest = b"-" if after is None else b"(" + after.encode()
        while members := await self._members(index, lowest):
            for seen in await self._digests(tenant_id, resource_type, list(_ids(members))):
                yield seen
            lowest = b"(" + members[-1]

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        """Return those of the resources that are live and in the index, with two round trips for every 200 of them."""
        names = list(dict.fromkeys(resource_ids))
        found: list[ResourceDigest] = []
        for start in range(0, len(names), _PAGE):
            ids = await self._listed(self._key(tenant_id, resource_type), names[start : start + _PAGE])
            found += await self._digests(tenant_id, resource_type, ids)
        return found

    async def scopes(self) -> Sequence[tuple[str, str]]:
        """Return every (tenant_id, resource_type) with an index, which a scope has as long as something in it is live.

        Walks past all keys of the database, a thousand in a round trip, and is sent the indices only: what another hand
        put here is found too. Takes a server of version 6 or newer.
        """
        found: dict[tuple[str, str], None] = {}
        async for keys in self._walk("zset"):
            found.update((scope, None) for key in keys if (scope := self._scope(key)) is not None)
        return list(found)

    async def highest_position(self) -> int:
        """Return the highest position ever held, deletes included; 0 when nothing was.

        The first time it walks past all keys of the database, for what was written before it was kept. Takes a server
        of version 6 or newer.
        """
        async with self._working():
            position, walked = await self._execute("HMGET", self._highest, "position", "walked", **_BYTES)
        highest = position_of(position)
        return highest if walked and (highest or position is None) else await self._walk_to_the_highest()

    async def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted."""
        [(_, content)] = await self._fields([self._key(tenant_id, resource_type, resource_id)])
        return content.decode() if content else None

    async def check(self) -> None:
        """Return when the server answers; raise `Unavailable` when it does not."""
        async with self._working():
            await self._execute("PING")

    async def aclose(self) -> None:
        """Close the connections if they were made here; a client that was given is left alone."""
        if self._owned:
            await self._client.aclose()

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        """Bound the time, and turn what goes wrong into `Unavailable`, without the server's words."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except UnicodeEncodeError:
            raise
        except (RedisError, OSError, ValueError) as error:
            raise Unavailable(code_of(error), "the server did not do what it was asked") from None

    async def _apply(self, events: Sequence[SyncEvent]) -> list[Outcome]:
        keys = [self._highest]
        keys += [key for event in events for key in (self._key(*event.key), self._key(*event.key[:2]))]
        values = [value for event in events for value in values_of(event)]
        arguments = (len(keys), *keys, self.tombstones_for // timedelta(milliseconds=1), *values)
        try:
            applied = await self._execute("EVALSHA", APPLY_SHA, *arguments)
        except NoScriptError:
            applied = await self._execute("EVAL", APPLY, *arguments)
        if not isinstance(applied, list) or len(applied) != len(events):
            return [_UNKNOWN] * len(events)
        return [_ANSWERS.get(answer, _UNKNOWN) if isinstance(answer, int) else _UNKNOWN for answer in applied]

    async def _members(self, index: bytes, lowest: bytes) -> list[bytes]:
        command = ("ZRANGEBYLEX", index, lowest, b"+", "LIMIT", 0, _PAGE)
        async with self._working():
            return list(await self._execute(*command, **_BYTES))

    async def _listed(self, index: bytes, ids: Sequence[str]) -> list[str]:
        """Return those of the ids that are in the index, and so in a listing."""
        async with self._working(), self._client.pipeline(transaction=False) as pipeline:
            for resource_id in ids:
                pipeline.execute_command("ZSCORE", index, resource_id.encode())
            scores = await pipeline.execute()
        return [resource_id for resource_id, score in zip(ids, scores, strict=True) if score is not None]

    async def _digests(self, tenant_id: str, resource_type: str, ids: Sequence[str]) -> list[ResourceDigest]:
        fields = await self._fields([self._key(tenant_id, resource_type, resource_id) for resource_id in ids])
        # Digests of large contents take long enough to keep the loop from its heartbeats.
        return await asyncio.to_thread(_digests, ids, fields)

    async def _fields(self, keys: Sequence[bytes]) -> list[tuple[bytes | None, bytes | None]]:
        """Return the position and the content of each key; of another hand's key, what equals nothing."""
        async with self._working(), self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.execute_command("HMGET", key, "position", "content", **_BYTES)
            return [_fields_of(answer) for answer in await pipeline.execute(raise_on_error=False)]

    async def _walk(self, kind: str) -> AsyncIterator[Sequence[bytes]]:
        """Yield our keys of one type; what is there from begin to end comes at least once."""
        cursor = 0
        while True:
            page = ("MATCH", f"{self._prefix}:*", "COUNT", _KEYS_AT_ONCE, "TYPE", kind)
            async with self._working():
                cursor, keys = await self._execute("SCAN", cursor, *page, **_BYTES)
            yield keys
            if not cursor:
                return

    async def _walk_to_the_highest(self) -> int:
        highest = 0
        async for keys in self._walk("hash"):
            async with self._working():
                found = await self._execute("EVAL", HIGHEST, len(keys), *keys, **_BYTES)
            highest = max(highest, int(found))
        # Who may only read walks each time.
        with suppress(Unavailable):
            async with self._working():
                highest = int(await self._execute("EVAL", RAISE, 1, self._highest, highest, **_BYTES))
        return highest

    def _scope(self, key: bytes) -> tuple[str, str] | None:
        """Return the tenant and type of an index; None when the key is not of its form."""
        parts = [unquote(part, errors="replace") for part in key.decode(errors="replace").split(":")[1:]]
        return (parts[0], parts[1]) if len(parts) == 2 and self._key(*parts) == key else None

    def _key(self, *parts: str) -> bytes:
        escaped = (part.replace("%", "%25").replace(":", "%3A") for part in parts)
        return ":".join((self._prefix, *escaped)).encode()


def _connect(url: str) -> Redis:
    # Once again at once, for a pooled connection that did not survive the server's restart; the relay does the rest.
    client: Redis = Redis.from_url(url, retry=Again(NoBackoff(), 1))
    return client


def _parts(batch: Sequence[SyncEvent]) -> Iterator[list[SyncEvent]]:
    part: list[SyncEvent] = []
    size = 0
    for event in batch:
        more = len((event.content or "").encode())
        if part and (size + more > _BYTES_AT_ONCE or len(part) == _EVENTS_AT_ONCE):
            yield part
            part, size = [], 0
        part.append(event)
        size += more
    if part:
        yield part


def _ids(members: Sequence[bytes]) -> Iterator[str]:
    """Yield what can be a resource's id: the rest is another hand's, and no event could name it."""
    for member in members:
        with suppress(UnicodeDecodeError):
            yield member.decode()


def _fields_of(answer: Any) -> tuple[bytes | None, bytes | None]:
    if not isinstance(answer, Exception):
        position, content = answer
        return position, content
    if code_of(answer) == "WRONGTYPE":
        return b"0", b""
    raise answer


def _digests(ids: Sequence[str], fields: Sequence[tuple[bytes | None, bytes | None]]) -> list[ResourceDigest]:
    """Leave out what was deleted since the ids were read."""
    return [
        _digest(resource_id, position_of(position), content)
        for resource_id, (position, content) in zip(ids, fields, strict=True)
        if position is not None and content is not None
    ]


def _digest(resource_id: str, position: int, content: bytes) -> ResourceDigest:
    # Whoever broke the position may have changed more, and only an event puts a position there again.
    return ResourceDigest(resource_id, position, digest_of(content) if position else "")
