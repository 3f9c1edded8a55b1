"""What OpenSearch and Elasticsearch have in common as secondaries: everything but the client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from outbox.errors import SettingsError, Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Outcome, Rejected, ResourceDigest, Retry
from outbox.secondaries.opensearch_answer import raise_refused, raise_unreadable
from outbox.secondaries.opensearch_bulk import (
    INDEX_MISSING,
    Write,
    bulk_body,
    outcomes_of,
    parts_of,
    write_of,
)
from outbox.secondaries.opensearch_documents import LIVE, alias_name, document_id, index_body
from outbox.secondaries.opensearch_generations import index_without_alias
from outbox.secondaries.opensearch_http import NDJSON, Request, SearchHttp
from outbox.secondaries.opensearch_overview import find_highest_position, list_scopes
from outbox.secondaries.opensearch_reads import Listing, read_content, refresh_index

__all__ = ["BULK_BYTES", "TIMEOUT", "ContentMapping", "SearchSecondary"]

#: What one bulk request may weigh, and how long one request may take, unless told otherwise.
BULK_BYTES = 5 * 1024 * 1024
TIMEOUT = timedelta(seconds=30)

ContentMapping = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]

_BACKEND_ID = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_PREFIX = re.compile(r"[a-z0-9][a-z0-9_-]{0,49}")


class SearchSecondary:
    """A secondary behind either server's API; `connect` makes the way to it."""

    def __init__(
        self,
        backend_id: str,
        connect: Callable[[timedelta], SearchHttp],
        *,
        prefix: str,
        mapping: ContentMapping | None,
        settings: Mapping[str, Any] | None,
        bulk_bytes: int,
        timeout: timedelta,
        verify_content: bool,
    ) -> None:
        if not _BACKEND_ID.fullmatch(backend_id):
            raise SettingsError("backend_id", "must match [a-z][a-z0-9_-]{0,62}")
        if not _PREFIX.fullmatch(prefix):
            raise SettingsError("prefix", "must match [a-z0-9][a-z0-9_-]{0,49}")
        if bulk_bytes < 1:
            raise SettingsError("bulk_bytes", "must be at least 1")
        if timeout <= timedelta(0):
            raise SettingsError("timeout", "must be longer than nothing")
        self._backend_id = backend_id
        self._http = connect(timeout)
        self._prefix = prefix
        self._mapping = mapping
        self._settings = dict(settings or {})
        self._bulk_bytes = bulk_bytes
        self._verify_content = verify_content

    @property
    def backend_id(self) -> str:
        """The name in the registry."""
        return self._backend_id

    def search_name(self, resource_type: str) -> str:
        """Return the name to search a type under: an alias that shows no tombstones."""
        return alias_name(self._prefix, resource_type)

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Write every event's document with its position as external version; a delete writes a tombstone.

        Creates an index and its alias where they are missing. Raises `Unavailable`, with what is known by then, when
        the server does not answer.
        """
        outcomes: list[Outcome] = []
        parts = parts_of((write_of(event, self._prefix) for event in batch), self._bulk_bytes)
        halves: list[Sequence[Write]] = []
        # Digests of megabytes take their time: not the event loop's, which keeps leases alive.
        while part := halves.pop() if halves else await asyncio.to_thread(next, parts, ()):
            try:
                answered = await self._write(part)
            except Unavailable as error:
                error.known = outcomes
                raise
            if answered is None:
                half = len(part) // 2
                halves += (part[half:], part[:half])
            else:
                outcomes += answered
        return outcomes

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield the live resources in id order, as visible after a refresh. Raises `Unavailable`.

        With `verify_content` the digest is computed from the content as it is held now. A document that another hand
        put under a wrong `_id` shows as altered, and stays so until it is removed by hand.
        """
        async for found in self._listed(tenant_id, resource_type, after):
            yield found

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        """Return those of the resources that are live, by a refresh and the same search and judgement as a scan.

        To get documents by `_id` would be cheaper and miss what another hand put beside them. Raises `Unavailable`.
        """
        only = list(dict.fromkeys(resource_ids))
        return [found async for found in self._listed(tenant_id, resource_type, None, only)]

    async def scopes(self) -> Sequence[tuple[str, str]]:
        """Return every (tenant_id, resource_type) with a live resource, as visible after a refresh.

        Asks once for each type. Raises `Unavailable`.
        """
        return await list_scopes(self._http, self._prefix)

    async def highest_position(self) -> int:
        """Return the highest position held, tombstones included, as visible after a refresh; 0 when nothing is held.

        Asks once for each type. Raises `Unavailable`.
        """
        return await find_highest_position(self._http, self._prefix)

    async def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted. Raises `Unavailable`."""
        alias = self.search_name(resource_type)
        return await read_content(self._http, alias, document_id(tenant_id, resource_id))

    async def refresh(self) -> None:
        """Return once everything applied so far is visible to searches. Raises `Unavailable`."""
        await refresh_index(self._http, f"{self._prefix}-*")

    async def check(self) -> None:
        """Return when the server answers; raise `Unavailable` when it does not."""
        answer = await self._http.send(Request("GET", "/"))
        raise_refused(answer)
        raise_unreadable(answer)

    async def aclose(self) -> None:
        """Close the client if it was made from an address; calling it twice is harmless."""
        await self._http.aclose()

    async def _listed(
        self, tenant_id: str, resource_type: str, after: str | None, only: Sequence[str] | None = None
    ) -> AsyncIterator[ResourceDigest]:
        alias, place = self.search_name(resource_type), (tenant_id, resource_type)
        if not await refresh_index(self._http, alias):
            return
        listing = Listing(self._http, alias, place, after, only=only, verify_content=self._verify_content)
        while not listing.complete:
            for found in await listing.next_page():
                yield found

    async def _write(self, part: Sequence[Write]) -> list[Outcome] | None:
        """Write a part; None when the server finds it too large and it can be split."""
        found = await self._bulk(part)
        if found is None:
            return None
        lost = [at for at, one in enumerate(found) if isinstance(one, Retry) and one.code == INDEX_MISSING]
        if lost:
            await self._restore(part, found, lost)
        return found

    async def _restore(self, part: Sequence[Write], found: list[Outcome], lost: Sequence[int]) -> None:
        """Create the missing indices and write once more what found none."""
        writes = [part[at] for at in lost]
        try:
            for write in {write.alias: write for write in writes}.values():
                await self._create_index(write)
            again = await self._bulk(writes)
        except Unavailable:
            if len(lost) == len(part):
                raise
            return
        for at, one in zip(lost, again or (), strict=again is not None):
            found[at] = one

    async def _bulk(self, part: Sequence[Write]) -> list[Outcome] | None:
        # Without `require_alias` a server that lost an index would make one up, without our mapping and our alias.
        request = Request("POST", "/_bulk", bulk_body(part), {"require_alias": "true"}, NDJSON)
        answer = await self._http.send(request)
        if answer.status == 413:
            return None if len(part) > 1 else [Rejected("too_large")]
        raise_refused(answer)
        return outcomes_of(answer, part)

    async def _create_index(self, write: Write) -> None:
        """Create the index behind an alias; one that is left and only lost its alias gets it back, guard and all."""
        left = await index_without_alias(self._http, self._prefix, write.alias)
        if left is None and await self._is_created(write):
            return
        add = {"index": left or write.index, "alias": write.alias, "filter": LIVE}
        actions = json.dumps({"actions": [{"add": add}]}).encode()
        raise_refused(await self._http.send(Request("POST", "/_aliases", actions)))

    async def _is_created(self, write: Write) -> bool:
        """Create an index together with its alias; False when somebody else did by now."""
        mapping = self._mapping(write.resource_type) if callable(self._mapping) else self._mapping
        body = index_body(write.alias, mapping, self._settings)
        answer = await self._http.send(Request("PUT", f"/{write.index}", json.dumps(body).encode()))
        if answer.error == "resource_already_exists_exception":
            return False
        raise_refused(answer)
        return True
