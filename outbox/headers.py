"""Headers: what all events of a unit of work carry to the secondaries: who asked for it, in which trace (D67)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from msgspec.structs import replace

from outbox.event import SyncEvent
from outbox.names import ACTOR, CORRELATION_ID, TRACEPARENT, encode_headers, parsed_headers
from outbox.tracing import current_traceparent

__all__ = ["Carrying", "carrying", "checked_headers", "headers"]

_NOTHING: Mapping[str, str] = MappingProxyType({})
_ambient: ContextVar[Mapping[str, str]] = ContextVar("outbox_headers", default=_NOTHING)


class Carrying(list[SyncEvent]):
    """Events that have their headers; whoever writes them later, in another context, adds none."""

    __slots__ = ()


@contextmanager
def headers(
    more: Mapping[str, str] | None = None,
    /,
    *,
    correlation_id: str | None = None,
    actor: str | None = None,
    traceparent: str | None = None,
) -> Iterator[None]:
    """Have every event that is recorded in this context, by whatever session or connection, carry these headers.

    They arrive as `correlation-id`, `actor`, `traceparent`, and under the names in `more`. An event's own headers win
    over its session's, the session's over these, and these over those of an enclosing `with`; without a traceparent
    from any of them, OpenTelemetry's current span gives it. What counts is where `record` is called and, for changes
    of tracked classes, where they are flushed. Tasks started inside inherit the headers; threads do if they copy the
    context. Raises `InvalidEvent` on entering.
    """
    given = checked_headers(correlation_id, actor, traceparent, more)
    token = _ambient.set({**_ambient.get(), **given})
    try:
        yield
    finally:
        _ambient.reset(token)


def checked_headers(
    correlation_id: str | None, actor: str | None, traceparent: str | None, more: Mapping[str, str] | None
) -> dict[str, str]:
    """Put headers together, those given by keyword over those in `more`. Raises `InvalidEvent`."""
    encode_headers(_NOTHING if more is None else more)
    named = {CORRELATION_ID: correlation_id, ACTOR: actor, TRACEPARENT: traceparent}
    given = {**(more or {}), **{name: value for name, value in named.items() if value is not None}}
    encode_headers(given)
    return given


def carrying(events: Iterable[SyncEvent], of_session: Mapping[str, str] = _NOTHING) -> Carrying:
    """Return the events with the headers of the session and of this context, wherever they have none of that name."""
    if isinstance(events, Carrying):
        return events
    ambient = _ambient.get()
    # Every writer pays for this, mostly for nothing: unpacking read-only mappings would cost as much as all the rest.
    shared = {**ambient, **of_session} if ambient or of_session else {}
    if TRACEPARENT not in shared and (current := current_traceparent()) is not None:
        shared[TRACEPARENT] = current
    if not shared:
        return Carrying(events)
    alone = _encoded(shared)
    return Carrying(
        replace(event, headers=alone if event.headers is None else _filled(event.headers, shared)) for event in events
    )


def _filled(own: str, shared: Mapping[str, str]) -> str:
    said = parsed_headers(own)
    # What an event built by hand says in another form than ours stays as it is.
    return _encoded({**shared, **said}) if said else own


def _encoded(given: Mapping[str, str]) -> str:
    # Every part was checked where it was given.
    return json.dumps(given, ensure_ascii=False, separators=(",", ":"))
