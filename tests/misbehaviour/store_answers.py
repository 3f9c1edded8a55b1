"""What a store of resources says, though connections are well."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from tests.misbehaviour.faults import POISON, Fault, Section
from tests.misbehaviour.outcomes import Away, Blamed, OneDead, OneRetried, Outcome
from tests.misbehaviour.stands import Stand

Made = Callable[[Stand], AbstractAsyncContextManager[None]]


def says(answer: dict[str, Any], about: str = "") -> Made:
    """About one resource, or about each that is written."""

    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        def fault(name: str, values: list[Any]) -> dict[str, Any] | None:
            writes = name in ("create_or_update", "delete")
            return answer if writes and (not about or values[2] == about) else None

        server = stand.hands["server"]
        usual, server.fault = server.fault, fault
        yield
        server.fault = usual

    return make


def alone(outcome: Outcome) -> dict[str, Outcome]:
    return {"storage": outcome}


STORE = Section(
    "What a store says",
    [
        (
            Fault("one resource is busy", says({"error": "busy", "code": "deadlock"}, POISON)),
            alone(OneRetried("deadlock")),
        ),
        (
            Fault("one resource is refused", says({"error": "refused", "code": "invalid"}, POISON)),
            alone(OneDead("invalid")),
        ),
        (
            Fault("one resource ends in an error that nobody explained", says({"error": "odd", "code": ""}, POISON)),
            alone(OneRetried("adapter_error")),
        ),
        (
            Fault("every resource is busy", says({"error": "busy", "code": "throttled"})),
            alone(Blamed("throttled")),
        ),
        (
            Fault("it is closed for today", says({"error": "unavailable", "code": "closed"})),
            alone(Away("closed")),
        ),
        (Fault("neither yes nor no", says({"is": "perhaps"})), alone(Blamed("unknown_outcome"))),
    ],
    dict.fromkeys(
        ("memory", "postgres", "mariadb", "sqlite", "opensearch", "elasticsearch", "valkey"), "no such store"
    ),
)
