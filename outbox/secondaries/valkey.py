"""Valkey or Redis as a secondary: a hash for every resource, and a sorted set of ids for every tenant and type.

A batch is one script in one round trip, so nobody ever sees half of an event. A delete leaves a hash with a position
and without content, which expires: `tombstones_for` must outlast the longest time that an event can be under way.

Keys are `prefix:tenant:type:id` and `prefix:tenant:type`, with `%` and `:` escaped inside the parts. A cluster spreads
them over slots, where no script reaches them all, unless the prefix is a hash tag such as `{outbox}`. The server must
not evict (`maxmemory-policy noeviction`); what it evicts, or loses in a restart, the next reconcile finds missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeout

from outbox.content import content_digest
from outbox.errors import SettingsError, Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, ResourceDigest, Stale

__all__ = ["ValkeySecondary"]

_PREFIX = re.compile(r"[A-Za-z0-9_.-]+|\{[A-Za-z0-9_.-]+\}")
_PAGE = 200
# A script holds up every other client of the server; this much takes a few milliseconds.
_BYTES_AT_ONCE = 4 * 1024 * 1024
_EVENTS_AT_ONCE = 1_000
# Answers stay bytes, whatever the client was told to do with them.
_BYTES: dict[str, Any] = {NEVER_DECODE: True}

# Lua's numbers are doubles, so positions are compared as text: the longer is the higher. A full server stops a script
# before it has written anything or not at all; were it stopped later, every event up to there still stands whole.
_APPLY = b"""
local function keep(resource, field, value)
  if value == '' then redis.call('HDEL', resource, field) else redis.call('HSET', resource, field, value) end
end
local outcomes = {}
for n = 1, #KEYS / 2 do
  local resource, index = KEYS[2 * n - 1], KEYS[2 * n]
  local id, position, content, version, fhir_version = unpack(ARGV, 5 * n - 3, 5 * n + 1)
  local held = redis.call('HGET', resource, 'position')
  if held and (#held > #position or (#held == #position and held >= position)) then
    outcomes[n] = 0
  else
    if content == '' then redis.call('ZREM', index, id) else redis.call('ZADD', index, 0, id) end
    keep(resource, 'content', content)
    keep(resource, 'version', version)
    keep(resource, 'fhir_version', fhir_version)
    redis.call('HSET', resource, 'position', position)
    if content == '' then redis.call('PEXPIRE', resource, ARGV[1]) else redis.call('PERSIST', resource) end
    outcomes[n] = 1
  end
end
return outcomes
"""
_APPLY_SHA = hashlib.sha1(_APPLY, usedforsecurity=False).hexdigest()

_CODES: dict[type[Exception], str] = {
    TimeoutError: "timeout",
    RedisTimeout: "timeout",
    BusyLoadingError: "LOADING",
    MasterDownError: "MASTERDOWN",
    ReadOnlyError: "READONLY",
    OutOfMemoryError: "OOM",
    AuthenticationError: "NOAUTH",
    NoPermissionError: "NOPERM",
}


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
        self._owned = not isinstance(client_or_url, Redis)
        self._client = client_or_url if isinstance(client_or_url, Redis) else _connect(client_or_url)
        # It has no annotations of its own.
        self._execute: Callable[..., Awaitable[Any]] = self._client.execute_command
        self._tombstones_for = tombstones_for // timedelta(milliseconds=1)
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
        while ids := await self._ids(index, lowest):
            fields = await self._fields([self._key(tenant_id, resource_type, found) for found in ids])
            # Digests of large contents take long enough to keep the loop from its heartbeats.
            for seen in await asyncio.to_thread(_digests, ids, fields):
                yield seen
            lowest = b"(" + ids[-1].encode()

    async def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted."""
        [(_, content)] = await self._fields([self._key(tenant_id, resource_type, resource_id)])
        return None if content is None else content.decode()

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
        except (RedisError, OSError) as error:
            raise Unavailable(_code(error), "the server did not do what it was asked") from None

    async def _apply(self, events: Sequence[SyncEvent]) -> list[Outcome]:
        keys = [key for event in events for key in (self._key(*event.key), self._key(*event.key[:2]))]
        values = [value for event in events for value in _values(event)]
        arguments = (len(keys), *keys, self._tombstones_for, *values)
        try:
            applied = await self._execute("EVALSHA", _APPLY_SHA, *arguments)
        except NoScriptError:
            applied = await self._execute("EVAL", _APPLY, *arguments)
        return [Applied() if done else Stale() for done in applied]

    async def _ids(self, index: bytes, lowest: bytes) -> list[str]:
        command = ("ZRANGEBYLEX", index, lowest, b"+", "LIMIT", 0, _PAGE)
        async with self._working():
            found = await self._execute(*command, **_BYTES)
        return [resource_id.decode() for resource_id in found]

    async def _fields(self, keys: Sequence[bytes]) -> list[tuple[bytes | None, bytes | None]]:
        """Return the position and the content of each key."""
        async with self._working(), self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.execute_command("HMGET", key, "position", "content", **_BYTES)
            return [(position, content) for position, content in await pipeline.execute()]

    def _key(self, *parts: str) -> bytes:
        escaped = (part.replace("%", "%25").replace(":", "%3A") for part in parts)
        return ":".join((self._prefix, *escaped)).encode()


def _connect(url: str) -> Redis:
    # Once again at once, for a pooled connection that did not survive the server's restart; the relay does the rest.
    client: Redis = Redis.from_url(url, retry=Retry(NoBackoff(), 1))
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


def _values(event: SyncEvent) -> Iterator[bytes]:
    assert event.position is not None, "only a recorded event has a position to compare"
    yield event.resource_id.encode()
    yield str(event.position).encode()
    # Empty stands for absent: none of the three can be empty text.
    for value in (event.content, event.version, event.fhir_version):
        yield (value or "").encode()


def _digests(ids: Sequence[str], fields: Sequence[tuple[bytes | None, bytes | None]]) -> list[ResourceDigest]:
    """Leave out what was deleted since the ids were read."""
    return [
        ResourceDigest(resource_id, int(position), content_digest(content.decode()))
        for resource_id, (position, content) in zip(ids, fields, strict=True)
        if position is not None and content is not None
    ]


def _code(error: Exception) -> str:
    """Return a word for what went wrong; of a server's answer only its code, as its text may quote keys."""
    for kind, word in _CODES.items():
        if isinstance(error, kind):
            return word
    if isinstance(error, ResponseError):
        code = str(error).partition(" ")[0]
        return code if code.isascii() and code.isupper() else "ERR"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionRefusedError):
        cause = cause.__cause__ or cause.__context__
    return "disconnected" if cause is None else "refused"
