"""Bulk writes to a search server: the body by hand, so that content stays as it is; the answer item by item."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import msgspec

from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, Rejected, Retry, Stale
from outbox.secondaries.opensearch_answer import Answer, error_type, raise_unreadable
from outbox.secondaries.opensearch_documents import alias_name, document_id, document_text, index_name, is_behind

__all__ = [
    "INDEX_MISSING",
    "UNKNOWN_OUTCOME",
    "Write",
    "bulk_body",
    "outcomes_of",
    "parts_of",
    "write_of",
]

INDEX_MISSING = "index_not_found_exception"
UNKNOWN_OUTCOME = Retry("unknown_outcome")
_REASONS_OF_ITS_OWN = "the search server refused the document for reasons of its own"
# Errors that blame the cluster or the index, whatever their status: no document is at fault, none is given up.
_SECONDARY_FAULTS = frozenset(
    {
        INDEX_MISSING,
        "cluster_block_exception",
        "cluster_manager_not_discovered_exception",
        "es_rejected_execution_exception",
        "index_closed_exception",
        "master_not_discovered_exception",
        "node_closed_exception",
        "process_cluster_event_timeout_exception",
        "rejected_execution_exception",
        "security_exception",
        "unavailable_shards_exception",
    }
)
# Too much to do, or not up yet: an answer about the cluster by whatever name, as there is no end to the names.
_OVERLOADED = (429, 503)


class Write(msgspec.Struct, frozen=True):
    """One document on its way: where it goes, the position it carries as external version, and its two lines."""

    resource_type: str
    alias: str
    index: str
    document_id: str
    position: int
    lines: bytes


class _Error(msgspec.Struct):
    # The reason beside it is never read: it quotes values of the document.
    type: str


class _Result(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    index: str = msgspec.field(name="_index")
    status: int
    version: int | None = msgspec.field(name="_version", default=None)
    error: _Error | None = None


class _Item(msgspec.Struct):
    index: _Result


class _BulkAnswer(msgspec.Struct):
    items: list[_Item]


_DECODER = msgspec.json.Decoder(_BulkAnswer)


def write_of(event: SyncEvent, prefix: str) -> Write:
    """Return the write of an event; a delete writes a tombstone, for the server forgets a real one in a minute."""
    assert event.position is not None, "only a recorded event has a position to compare"
    alias = alias_name(prefix, event.resource_type)
    identity = document_id(event.tenant_id, event.resource_id)
    action = (
        f'{{"index":{{"_index":"{alias}","_id":{json.dumps(identity, ensure_ascii=False)}'
        f',"version":{event.position},"version_type":"external"}}}}'
    )
    return Write(
        event.resource_type,
        alias,
        index_name(prefix, event.resource_type),
        identity,
        event.position,
        f"{action}\n{document_text(event)}\n".encode(),
    )


def bulk_body(writes: Sequence[Write]) -> bytes:
    """Return the body of one bulk request."""
    return b"".join(write.lines for write in writes)


def parts_of(writes: Iterable[Write], most_bytes: int) -> Iterator[Sequence[Write]]:
    """Split writes, in order, into bodies of at most `most_bytes`; a larger write goes alone."""
    part: list[Write] = []
    size = 0
    for write in writes:
        if part and size + len(write.lines) > most_bytes:
            yield part
            part, size = [], 0
        part.append(write)
        size += len(write.lines)
    if part:
        yield part


def outcomes_of(answer: Answer, writes: Sequence[Write]) -> list[Outcome]:
    """Read an answer against the request it belongs to; whatever does not fit is of unknown outcome.

    An answer of another length says nothing about any write, for nobody can tell which item is missing or too many.
    Raises `Unavailable` when it is no JSON object: a page that says "back soon" is no search server's word on an event.
    """
    try:
        items = _DECODER.decode(answer.body).items
    except msgspec.MsgspecError:
        raise_unreadable(answer)
        items = []
    if len(items) != len(writes):
        return [UNKNOWN_OUTCOME] * len(writes)
    return [_outcome(item.index, write, answer.retry_after) for item, write in zip(items, writes, strict=True)]


def _outcome(result: _Result, write: Write, after: timedelta | None) -> Outcome:
    known = result.index in (write.alias, write.index) or is_behind(result.index, write.alias)
    if result.id != write.document_id or not known:
        return UNKNOWN_OUTCOME
    if result.status in (200, 201):
        # A server that did not keep our version would not refuse an older one either.
        return Applied() if result.version == write.position else UNKNOWN_OUTCOME
    if result.error is None:
        return UNKNOWN_OUTCOME
    return _failure(result.status, error_type(result.error.type), after)


def _failure(status: int, code: str, after: timedelta | None) -> Outcome:
    if status == 409 and code == "version_conflict_engine_exception":
        return Stale()
    if status in _OVERLOADED or code in _SECONDARY_FAULTS:
        return Retry(code, _REASONS_OF_ITS_OWN, after, blameless=True)
    if status in (400, 404, 413):
        return Rejected(code)
    return Retry(code, after=after)
