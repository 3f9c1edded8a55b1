"""Spans (D67): one per dispatched batch, linked to the traces of its events, telling nothing of their content."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, Registration, Rejected, Retry, SyncEvent, SyncManager, headers, tracing
from outbox.attempt import Attempt
from outbox.dispatch import dispatch
from outbox.errors import Unavailable
from tests.relaying import change, manager_of, running, write
from tests.scripted import Hang, ScriptedSecondary
from tests.waiting import eventually

SECRET = "Chalmers-7391"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What the relay's spans are sent to, in place of the process's one provider, which could not be taken back."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("outbox"))
    yield exporter
    provider.shutdown()


def traceparent(number: int) -> str:
    return f"00-{number:032x}-{number:016x}-01"


def attempt_of(*events: SyncEvent) -> Attempt:
    recorded = [
        SyncEvent(*each.key, each.operation, each.content, headers=each.headers, position=position)
        for position, each in enumerate(events, 1)
    ]
    return Attempt(1, "scripted", log_order=False, events=recorded, held={})


def traced_change(name: str, parent: str) -> SyncEvent:
    return SyncEvent.update("Thing", name, {}, headers={"traceparent": parent})


def links_of(span: ReadableSpan) -> list[int]:
    return [link.context.trace_id for link in span.links]


async def relayed(manager: SyncManager, spans: InMemorySpanExporter) -> Sequence[ReadableSpan]:
    await manager.relay().drain()
    return spans.get_finished_spans()


async def test_a_batch_is_one_span_that_links_to_the_traces_of_its_events(
    primary: AsyncEngine, spans: InMemorySpanExporter
) -> None:
    manager = manager_of(primary, MemorySecondary("cache"))
    await manager.register()
    for number in (1, 2):
        with headers(traceparent=traceparent(number)):
            await write(manager, change(f"{number}"), change(f"{number}-too"))
    await write(manager, change("3"))
    [span] = await relayed(manager, spans)
    assert span.name == "outbox.dispatch"
    assert span.kind is trace.SpanKind.CONSUMER
    assert links_of(span) == [1, 2]
    assert dict(span.attributes or {}) == {"outbox.backend_id": "cache", "outbox.events": 5, "outbox.applied": 5}
    assert span.status.is_unset
    assert span.parent is None


async def test_a_change_made_in_a_span_is_linked_to_it(primary: AsyncEngine, spans: InMemorySpanExporter) -> None:
    """From the request's span into the event, and from the event into the relay's."""
    manager = manager_of(primary, MemorySecondary())
    await manager.register()
    with TracerProvider().get_tracer("app").start_as_current_span("request") as request:
        await write(manager, change("1"))
    [span] = await relayed(manager, spans)
    [link] = span.links
    assert (link.context.trace_id, link.context.span_id) == (
        request.get_span_context().trace_id,
        request.get_span_context().span_id,
    )
    assert link.context.trace_flags == request.get_span_context().trace_flags
    assert link.context.is_remote


async def test_outcomes_are_counted_by_their_names(spans: InMemorySpanExporter) -> None:
    secondary = ScriptedSecondary()
    secondary.always("2", Retry("busy"))
    secondary.always("3", Rejected("refused", SECRET))
    attempt = attempt_of(*map(change, ("1", "1", "2", "3", "4")))
    await dispatch(secondary, attempt, timedelta(seconds=5))
    [span] = spans.get_finished_spans()
    assert dict(span.attributes or {}) == {
        "outbox.backend_id": "scripted",
        "outbox.events": 5,
        "outbox.applied": 2,
        "outbox.superseded": 1,
        "outbox.retry": 1,
        "outbox.rejected": 1,
    }
    assert span.status.is_unset, "an event that fails is not a secondary that fails"


async def test_an_unavailable_secondary_is_an_error(primary: AsyncEngine, spans: InMemorySpanExporter) -> None:
    secondary = ScriptedSecondary()
    secondary.down = Unavailable("refused", SECRET)
    manager = manager_of(primary, secondary)
    await manager.register()
    await write(manager, change("1"))
    async with running(manager.relay()):
        await eventually(spans.get_finished_spans)
    span = spans.get_finished_spans()[0]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "refused"
    assert span.attributes is not None
    assert span.attributes["error.type"] == "refused"
    assert span.attributes["outbox.released"] == 1


async def test_a_hanging_secondary_is_an_error(spans: InMemorySpanExporter) -> None:
    secondary = ScriptedSecondary()
    secondary.hang()
    await dispatch(secondary, attempt_of(change("1")), timedelta(milliseconds=10))
    [span] = spans.get_finished_spans()
    assert span.status.description == "timeout"


async def test_links_are_bounded_and_each_traceparent_has_one(spans: InMemorySpanExporter) -> None:
    odd = [replace(change(f"odd {number}"), headers=f'{{"traceparent":"00-{number}"}}') for number in range(100)]
    events = [
        SyncEvent.update(
            "Thing",
            f"{number}",
            {},
            headers={"traceparent": traceparent(1 + number // 2), "correlation-id": f"{number}"},
        )
        for number in range(100)
    ]
    await dispatch(ScriptedSecondary(), attempt_of(*odd, *events), timedelta(seconds=5))
    [span] = spans.get_finished_spans()
    assert links_of(span) == list(range(1, 33))
    assert span.attributes is not None
    assert span.attributes["outbox.events"] == 200


@pytest.mark.parametrize(
    "odd", ['"traceparent"', "[]", '{"traceparent":7}', '{"traceparent":"7391"}', '{"traceparent":["00"]}', "["]
)
async def test_odd_headers_give_no_link_and_do_no_harm(spans: InMemorySpanExporter, odd: str) -> None:
    strange = SyncEvent("t", "Thing", "1", change("1").operation, "{}", headers=odd)
    attempt = attempt_of(strange, traced_change("2", traceparent(2)))
    dispatched = await dispatch(ScriptedSecondary(), attempt, timedelta(seconds=5))
    assert len(dispatched.results) == 2
    [span] = spans.get_finished_spans()
    assert links_of(span) == [2]


class Refusing(MemorySecondary):
    """Raises, with content in the error's text, and keeps the span it was called in."""

    def __init__(self) -> None:
        super().__init__("refusing")
        self.called_in: list[trace.SpanContext] = []

    async def apply(self, batch: Sequence[SyncEvent]) -> Any:
        self.called_in.append(trace.get_current_span().get_span_context())
        raise ValueError(SECRET)


async def test_no_content_tenant_id_or_actor_is_in_a_span(primary: AsyncEngine, spans: InMemorySpanExporter) -> None:
    """Promise 14, of spans."""
    manager = manager_of(primary, Registration(Refusing()), MemorySecondary(), max_attempts=1)
    await manager.register()
    with headers(actor=SECRET, correlation_id=SECRET, traceparent=traceparent(1)):
        await write(manager, SyncEvent.create("Thing", SECRET, {SECRET: SECRET}, tenant_id=SECRET, version=SECRET))
    finished = await relayed(manager, spans)
    assert {(span.attributes or {})["outbox.backend_id"] for span in finished} == {"refusing", "memory"}
    for span in finished:
        assert span.events == ()
        assert SECRET not in span.to_json()


async def test_what_the_adapter_does_happens_inside_of_the_span(
    primary: AsyncEngine, spans: InMemorySpanExporter
) -> None:
    refusing = Refusing()
    manager = manager_of(primary, refusing, max_attempts=1)
    await manager.register()
    await write(manager, change("1"))
    [span] = await relayed(manager, spans)
    assert {context.span_id for context in refusing.called_in} == {span.context.span_id}


async def test_the_text_of_a_defect_is_not_in_the_span(spans: InMemorySpanExporter) -> None:
    """Dispatch raises nothing; if it ever did, the text of the error could be anybody's."""

    @tracing.traced
    async def defective(*_: object) -> Any:
        raise ValueError(SECRET)

    with pytest.raises(ValueError, match=SECRET):
        await defective(ScriptedSecondary(), attempt_of(change("1")), timedelta(seconds=5))
    [span] = spans.get_finished_spans()
    assert SECRET not in span.to_json()


async def test_a_dispatch_that_is_given_up_ends_its_span(spans: InMemorySpanExporter) -> None:
    secondary = ScriptedSecondary()
    secondary.script("1", Hang())
    dispatching = asyncio.create_task(dispatch(secondary, attempt_of(change("1")), timedelta(minutes=1)))
    await eventually(lambda: secondary.running)
    dispatching.cancel()
    await asyncio.wait({dispatching})
    assert dispatching.cancelled()
    [span] = spans.get_finished_spans()
    assert span.status.is_unset
    assert span.events == ()


async def test_a_dispatch_that_is_given_up_before_it_began_leaves_no_trace(spans: InMemorySpanExporter) -> None:
    """Nor a coroutine that was never awaited, which would be a warning and so an error here."""
    dispatching = asyncio.create_task(dispatch(ScriptedSecondary(), attempt_of(change("1")), timedelta(minutes=1)))
    dispatching.cancel()
    await asyncio.wait({dispatching})
    assert dispatching.cancelled()
    assert spans.get_finished_spans() == ()


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, of=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import asyncio
import outbox
from outbox.attempt import Attempt
from outbox.dispatch import dispatch
from outbox.tracing import current_traceparent
from datetime import timedelta
from msgspec.structs import replace

assert not any(name.startswith("opentelemetry") for name in sys.modules)
assert current_traceparent() is None
assert dispatch.__module__ == "outbox.dispatch" and not hasattr(dispatch, "__wrapped__")
event = replace(outbox.SyncEvent.update("Thing", "1", {}, headers={"actor": "a"}), position=1)
attempt = Attempt(1, "memory", log_order=False, events=[event], held={})
print(asyncio.run(dispatch(outbox.MemorySecondary(), attempt, timedelta(seconds=5))).results)
"""


def test_without_opentelemetry_there_is_no_span_and_everything_works() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Applied\(\)", done.stdout)


def test_with_opentelemetry_the_dispatch_of_the_relay_is_traced() -> None:
    assert hasattr(dispatch, "__wrapped__")
