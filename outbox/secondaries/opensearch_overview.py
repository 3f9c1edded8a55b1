"""What a search server holds as a whole: for which tenants and types, and up to which position."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from outbox.secondaries.opensearch_answer import raise_refused
from outbox.secondaries.opensearch_documents import LIVE, alias_name
from outbox.secondaries.opensearch_http import Request, SearchHttp
from outbox.secondaries.opensearch_reads import Searched, complete, decoded, refresh_index, search

__all__ = ["find_highest_position", "list_scopes"]

_PAGE = 1_000
# A type never has a hyphen here, so an alias of a longer prefix that begins with ours is told from one of ours.
_TYPE = re.compile(r"[a-z0-9_.]+")


class _Aliases(msgspec.Struct):
    aliases: dict[str, Any]


class _Bucket(msgspec.Struct):
    key: dict[str, str]


class _Buckets(msgspec.Struct):
    buckets: list[_Bucket]
    after_key: dict[str, str] | None = None


class _Scopes(msgspec.Struct):
    scopes: _Buckets


class _ScopePage(Searched):
    aggregations: _Scopes


class _Fields(msgspec.Struct):
    position: list[int]


class _Hit(msgspec.Struct):
    fields: _Fields


class _Hits(msgspec.Struct):
    hits: list[_Hit]


class _Top(Searched):
    hits: _Hits


async def list_scopes(http: SearchHttp, prefix: str) -> list[tuple[str, str]]:
    """Return every tenant and type with a live document where a listing would look for it. Raises `Unavailable`."""
    await refresh_index(http, f"{prefix}-*")
    found: list[tuple[str, str]] = []
    for alias in await _indices_of(http, prefix):
        found += [scope for scope in await _scopes_under(http, alias) if alias_name(prefix, scope[1]) == alias]
    return found


async def find_highest_position(http: SearchHttp, prefix: str) -> int:
    """Return the highest position of all documents, tombstones included, else 0. Raises `Unavailable`."""
    await refresh_index(http, f"{prefix}-*")
    indices = {index for behind in (await _indices_of(http, prefix)).values() for index in behind}
    return max([await _highest_in(http, index) for index in sorted(indices)], default=0)


async def _indices_of(http: SearchHttp, prefix: str) -> Mapping[str, Sequence[str]]:
    """Return our aliases, each with what lies behind it."""
    answer = await http.send(Request("GET", f"/_alias/{prefix}-*"))
    if answer.status == 404:
        return {}
    raise_refused(answer)
    found: dict[str, list[str]] = {}
    for index, named in decoded(answer, dict[str, _Aliases]).items():
        for alias in named.aliases:
            if alias.startswith(f"{prefix}-") and _TYPE.fullmatch(alias.removeprefix(f"{prefix}-")):
                found.setdefault(alias, []).append(index)
    return found


async def _scopes_under(http: SearchHttp, alias: str) -> list[tuple[str, str]]:
    fields = ("tenant_id", "resource_type")
    composite: dict[str, Any] = {"size": _PAGE, "sources": [{name: {"terms": {"field": name}}} for name in fields]}
    query = {
        "size": 0,
        "query": {"bool": {"filter": [LIVE, {"exists": {"field": "resource_id"}}]}},
        "aggs": {"scopes": {"composite": composite}},
        "track_total_hits": False,
    }
    found: list[tuple[str, str]] = []
    while True:
        page = complete(await search(http, alias, json.dumps(query).encode()), _ScopePage).aggregations.scopes
        found += [(bucket.key["tenant_id"], bucket.key["resource_type"]) for bucket in page.buckets]
        if not page.buckets or page.after_key is None:
            return found
        composite["after"] = page.after_key


async def _highest_in(http: SearchHttp, index: str) -> int:
    # An aggregation would answer in binary floats; the stored values of the first in order are whole numbers.
    query = {
        "size": 1,
        "query": {"exists": {"field": "position"}},
        "sort": [{"position": {"order": "desc"}}],
        "docvalue_fields": ["position"],
        "_source": False,
        "track_total_hits": False,
    }
    top = complete(await search(http, index, json.dumps(query).encode()), _Top)
    return max((position for hit in top.hits.hits for position in hit.fields.position), default=0)
