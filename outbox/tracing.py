"""Tracing: one OpenTelemetry span per dispatched batch, linked to its events' traces; nothing without it (D67)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from itertools import islice
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from outbox.attempt import Attempt, Result
from outbox.errors import Unavailable
from outbox.event import SyncEvent
from outbox.names import TRACEPARENT, header_in
from outbox.secondaries.base import Secondary

__all__ = ["current_traceparent", "traced"]

# A batch of thousands may come from as many traces; a link is for following one, not for counting them.
_MOST_LINKS = 32


class _Ended(Protocol):
    """What a dispatch ends with."""

    @property
    def results(self) -> Sequence[Result]: ...

    @property
    def unavailable(self) -> Unavailable | None: ...


_E = TypeVar("_E", bound=_Ended)
_P = ParamSpec("_P")
_Dispatch = Callable[Concatenate[Secondary, Attempt, _P], Coroutine[Any, Any, _E]]

# Chosen once, so that who does not trace pays nothing.
try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:

    def current_traceparent() -> str | None:
        """Return None: there is no OpenTelemetry, and so no current span."""
        return None

    def traced(dispatch: _Dispatch[_P, _E]) -> _Dispatch[_P, _E]:
        """Return dispatch as it is: there is no OpenTelemetry to tell."""
        return dispatch

else:
    # Finds its provider with the first span, so it may be set up after the import.
    _tracer = trace.get_tracer("outbox")
    _w3c = TraceContextTextMapPropagator()

    def current_traceparent() -> str | None:
        """Return the W3C traceparent of OpenTelemetry's current span, None outside of one."""
        carrier: dict[str, str] = {}
        _w3c.inject(carrier)
        return carrier.get(TRACEPARENT)

    def traced(dispatch: _Dispatch[_P, _E]) -> _Dispatch[_P, _E]:
        """Return dispatch in a span `outbox.dispatch`: the secondary, how many events, how they ended, no content."""

        @wraps(dispatch)
        async def in_span(secondary: Secondary, attempt: Attempt, /, *more: _P.args, **named: _P.kwargs) -> _E:
            with _tracer.start_as_current_span(
                "outbox.dispatch",
                kind=trace.SpanKind.CONSUMER,
                attributes={"outbox.backend_id": attempt.backend_id, "outbox.events": len(attempt.events)},
                links=_links(attempt.events),
                # The text of an error may quote content.
                record_exception=False,
                set_status_on_exception=False,
            ) as span:
                ended = await dispatch(secondary, attempt, *more, **named)
                _describe(span, ended)
                return ended

        return in_span

    def _links(events: Sequence[SyncEvent]) -> list[trace.Link]:
        different = dict.fromkeys(event.headers for event in events if event.headers is not None)
        named = dict.fromkeys(header_in(headers, TRACEPARENT) for headers in different if TRACEPARENT in headers)
        contexts = map(_context_of, filter(None, named))
        return [trace.Link(context) for context in islice((each for each in contexts if each.is_valid), _MOST_LINKS)]

    def _context_of(traceparent: str) -> trace.SpanContext:
        return trace.get_current_span(_w3c.extract({TRACEPARENT: traceparent})).get_span_context()

    def _describe(span: trace.Span, ended: _Ended) -> None:
        if not span.is_recording():
            # Nobody listens, and every event of a batch would be looked at for nothing.
            return
        for kind, count in Counter(map(type, ended.results)).items():
            span.set_attribute(f"outbox.{kind.__name__.lower()}", count)
        if ended.unavailable is not None:
            span.set_attribute("error.type", ended.unavailable.code)
            span.set_status(trace.StatusCode.ERROR, ended.unavailable.code)
