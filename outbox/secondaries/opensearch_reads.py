"""Reading back from a search server: the listing that reconcile compares, and single documents, to the letter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

import msgspec

from outbox.content import content_digest
from outbox.errors import Unavailable
from outbox.secondaries.base import ResourceDigest
from outbox.secondaries.opensearch_answer import Answer, error_type, raise_refused
from outbox.secondaries.opensearch_bulk import INDEX_MISSING
from outbox.secondaries.opensearch_documents import LIVE, document_id
from outbox.secondaries.opensearch_http import SAME_COPIES, Request, SearchHttp

__all__ = ["Listing", "Searched", "complete", "decoded", "read_content", "refresh_index", "search"]

_PAGE = 500
_FIRST_PAGE = 64
_SMALLEST_PAGE = 8
_PAGE_BYTES = 8 * 1024 * 1024
# Stands where a digest would, and equals none.
_MISPLACED = "misplaced"
_UNREADABLE = "unreadable"

_T = TypeVar("_T")


class _Shards(msgspec.Struct):
    failed: int


class _Refreshed(msgspec.Struct):
    shards: _Shards = msgspec.field(name="_shards")


class _Hit(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    source: msgspec.Raw = msgspec.field(name="_source")
    sort: tuple[str]

    @property
    def resource_id(self) -> str:
        """The id as the server ordered by it."""
        return self.sort[0]


class _Hits(msgspec.Struct):
    hits: list[_Hit]


class Searched(msgspec.Struct):
    """What every answer to a search says of itself."""

    timed_out: bool
    shards: _Shards = msgspec.field(name="_shards")


_S = TypeVar("_S", bound=Searched)


class _Page(Searched):
    hits: _Hits


class _Stored(msgspec.Struct):
    position: int
    deleted: bool
    digest: str = ""
    content: msgspec.Raw = msgspec.Raw()


class _FoundError(msgspec.Struct):
    type: str


class _Found(msgspec.Struct):
    found: bool = False
    source: msgspec.Raw = msgspec.field(name="_source", default=msgspec.Raw())
    error: _FoundError | None = None


class _FoundAll(msgspec.Struct):
    docs: tuple[_Found]


class Listing:
    """The live documents of one tenant and type, page by page in the order of the id's UTF-8 bytes.

    With `only`, those of these resources. A page is as long as its documents are small, so that memory stays bounded
    for large resources too.
    """

    def __init__(
        self,
        http: SearchHttp,
        alias: str,
        key: tuple[str, str],
        after: str | None,
        *,
        only: Sequence[str] | None = None,
        verify_content: bool,
    ) -> None:
        self._http = http
        self._alias = alias
        self._tenant_id, self._resource_type = key
        self._after = after
        self._only = only
        self._verify = verify_content
        self._size = _FIRST_PAGE
        self.complete = False

    async def next_page(self) -> list[ResourceDigest]:
        """Return the next resources. Raises `Unavailable` when they may not be all there are."""
        answer = await search(self._http, self._alias, json.dumps(self._query()).encode())
        page = complete(answer, _Page)
        groups = [list(group) for _, group in groupby(page.hits.hits, lambda hit: hit.resource_id)]
        self.complete = len(page.hits.hits) < self._size
        if not self.complete and len(groups) > 1:
            # The next page may hold more documents of the last id; one id's documents are judged together.
            groups.pop()
        if groups:
            self._after = groups[-1][0].resource_id
        self._fit_size(len(page.hits.hits), len(answer.body))
        return await asyncio.to_thread(lambda: [self._digest(group) for group in groups])

    def _query(self) -> dict[str, Any]:
        mine = [
            {"term": {"tenant_id": self._tenant_id}},
            {"term": {"resource_type": self._resource_type}},
            LIVE,
            {"exists": {"field": "resource_id"}},
            *([] if self._only is None else [{"terms": {"resource_id": list(self._only)}}]),
        ]
        query: dict[str, Any] = {
            "size": self._size,
            "query": {"bool": {"filter": mine}},
            "sort": [{"resource_id": "asc"}],
            "track_total_hits": False,
            # A server that filters a source parses its numbers; whole, it hands out the bytes it was given.
            "_source": True if self._verify else ["position", "deleted", "digest"],
        }
        return query if self._after is None else {**query, "search_after": [self._after]}

    def _fit_size(self, hits: int, size: int) -> None:
        wanted = min(_PAGE, self._size * 4, _PAGE_BYTES * max(hits, 1) // max(size, 1))
        self._size = max(_SMALLEST_PAGE, wanted)

    def _digest(self, hits: Sequence[_Hit]) -> ResourceDigest:
        first = hits[0]
        stored = _stored(first.source)
        if len(hits) > 1 or first.id != document_id(self._tenant_id, first.resource_id):
            digest = _MISPLACED
        elif stored is None:
            digest = _UNREADABLE
        else:
            digest = _content_digest(stored.content) if self._verify else stored.digest
        return ResourceDigest(first.resource_id, 0 if stored is None else stored.position, digest)


async def search(http: SearchHttp, names: str, query: bytes) -> Answer:
    """Return the answer to a search; whether it is all there is, `complete` says. Raises `Unavailable`."""
    wanted = http.preference
    answer = await _search(http, names, query, wanted)
    if wanted != SAME_COPIES and answer.status == 400 and answer.error == "illegal_argument_exception":
        # OpenSearch before 2.8 does not know how to ask primaries.
        answer = await _search(http, names, query, SAME_COPIES)
        http.preference = SAME_COPIES if answer.status == 200 else wanted
    raise_refused(answer)
    return answer


async def _search(http: SearchHttp, names: str, query: bytes, preference: str) -> Answer:
    params = {"allow_partial_search_results": "false", "preference": preference}
    return await http.send(Request("POST", f"/{names}/_search", query, params))


def complete(answer: Answer, shape: type[_S]) -> _S:
    """Return what the answer to a search holds. Raises `Unavailable` when a part is missing."""
    found = decoded(answer, shape)
    if found.timed_out or found.shards.failed:
        raise Unavailable("partial_answer", "the search server answered for a part only")
    return found


async def refresh_index(http: SearchHttp, names: str) -> bool:
    """Make everything written to an index visible; False when there is none of that name. Raises `Unavailable`."""
    answer = await http.send(Request("POST", f"/{names}/_refresh"))
    if answer.status == 404 and answer.error == INDEX_MISSING:
        return False
    raise_refused(answer)
    if decoded(answer, _Refreshed).shards.failed:
        raise Unavailable("partial_answer", "the search server refreshed a part only")
    return True


async def read_content(http: SearchHttp, alias: str, identity: str) -> str | None:
    """Return the content of one document as text, None when it is absent or a tombstone. Raises `Unavailable`."""
    wanted = {"docs": [{"_index": alias, "_id": identity}]}
    answer = await http.send(Request("POST", "/_mget", json.dumps(wanted).encode()))
    raise_refused(answer)
    (found,) = decoded(answer, _FoundAll).docs
    if found.error is not None and found.error.type != INDEX_MISSING:
        raise Unavailable(error_type(found.error.type), "the search server could not read an index")
    stored = _stored(found.source) if found.found else None
    return None if stored is None or stored.deleted else bytes(stored.content).decode() or None


def decoded(answer: Answer, shape: type[_T]) -> _T:
    """Return what an answer holds. Raises `Unavailable` when it has another shape."""
    try:
        return msgspec.json.decode(answer.body, type=shape)
    except msgspec.MsgspecError as error:
        raise Unavailable("unreadable_answer", "the answer has not the expected shape") from error


def _stored(source: msgspec.Raw) -> _Stored | None:
    """Return the document of ours, None when somebody else's hand left it without our fields."""
    try:
        return msgspec.json.decode(source, type=_Stored)
    except msgspec.MsgspecError:
        return None


def _content_digest(content: msgspec.Raw) -> str:
    try:
        return content_digest(bytes(content).decode())
    except (ValueError, RecursionError):
        return _UNREADABLE
