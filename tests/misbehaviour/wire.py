"""On the wire: what can happen to connections, whatever is spoken on them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from unittest.mock import patch

from outbox.testing.line import Trouble
from tests.misbehaviour.faults import Fault, Section
from tests.misbehaviour.outcomes import Away, Done, Outcome
from tests.misbehaviour.stands import HOST, Stand

SHORT = 0.7
_resolve = socket.getaddrinfo


def troubled(trouble: Trouble, *, at_write: bool = False) -> Callable[[Stand], AbstractAsyncContextManager[None]]:
    """With `at_write`, only once the client has said what it says when it writes."""

    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        assert stand.line is not None
        stand.line.make(trouble, stand.says if at_write else b"")
        yield
        await stand.line.mend()

    return make


@asynccontextmanager
async def nobody_listens(stand: Stand) -> AsyncIterator[None]:
    assert stand.line is not None
    await stand.line.refuse()
    yield
    await stand.line.mend()


@asynccontextmanager
async def hung_up(stand: Stand) -> AsyncIterator[None]:
    assert stand.line is not None
    stand.line.hang_up()
    yield


def resolved(host: Any, *more: Any, **named: Any) -> Any:
    return _resolve("127.0.0.1" if host in (HOST, HOST.encode()) else host, *more, **named)


def unresolved(host: Any, *more: Any, **named: Any) -> Any:
    if host in (HOST, HOST.encode()):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return _resolve(host, *more, **named)


@asynccontextmanager
async def no_name(stand: Stand) -> AsyncIterator[None]:
    """Whoever is connected is reset too: a connection outlives its name."""
    assert stand.line is not None
    with patch("socket.getaddrinfo", unresolved):
        stand.forget_names()
        for call in tuple(stand.line.calls):
            call.cut()
        yield


CLOSED = "closed for an answer"
SEARCH = ("opensearch", "elasticsearch")


def cells(postgres: str, mariadb: str, search: str, valkey: str, storage: str) -> dict[str, Outcome]:
    codes = {"postgres": postgres, "mariadb": mariadb, "valkey": valkey, "storage": storage}
    found: dict[str, Outcome] = {name: Away(*code.split()) for name, code in codes.items()}
    return found | {name: Away(*search.split()) for name in SEARCH}


CONNECTED = ("postgres", "mariadb", *SEARCH, "valkey", "storage")
NOTICED_BY_NOBODY: dict[str, Outcome] = dict.fromkeys(CONNECTED, Done())

WIRE = Section(
    "On the wire",
    [
        (Fault("nobody listens", nobody_listens), cells("refused", "2003", "refused", "refused", "unreachable")),
        (
            Fault("its name does not resolve", no_name, named=True),
            cells("unreachable", "2003", "unreachable", "disconnected", "unreachable"),
        ),
        (
            Fault("every connection is reset", troubled(Trouble.RESET_AT_ONCE)),
            cells("unreachable 08003 08006", "2013", "connection_lost", "disconnected", "unreachable"),
        ),
        (
            Fault("connections are taken, nothing is answered", troubled(Trouble.SILENCE), SHORT),
            cells("timeout", "timeout", "timeout", "timeout", "timeout"),
        ),
        (
            Fault("it does as asked and never says so", troubled(Trouble.SWALLOW_ANSWER, at_write=True), SHORT),
            cells("timeout", "timeout", "timeout", "timeout", "unreachable"),
        ),
        (
            Fault("it does as asked, a reset comes back", troubled(Trouble.LOSE_ANSWER, at_write=True)),
            cells("08003", "2013", "connection_lost", "disconnected", "unreachable"),
        ),
        (
            Fault("it does as asked, the answer is cut off", troubled(Trouble.CUT_ANSWER, at_write=True)),
            cells("08003", "2013", "connection_lost", "disconnected", "unreachable"),
        ),
        (
            Fault("the connection is closed for an answer", troubled(Trouble.CLOSE_INSTEAD)),
            cells("unreachable 08003", "2013", "connection_lost", "disconnected", "unreachable"),
        ),
        (
            Fault(
                "the connection is closed once a batch is on its way", troubled(Trouble.CLOSE_INSTEAD, at_write=True)
            ),
            cells("08003", "2013", "connection_lost", "disconnected", "unreachable"),
        ),
        (
            Fault("HTML for an answer", troubled(Trouble.BABBLE), SHORT),
            cells("timeout unreachable", "InternalError timeout", "unreadable_answer", "disconnected", "unreachable"),
        ),
        (
            Fault("HTML once a batch is on its way", troubled(Trouble.BABBLE, at_write=True), SHORT),
            cells("timeout unreachable", "InternalError timeout", "unreadable_answer", "disconnected", "unreachable"),
        ),
        (
            Fault("an answer that never ends", troubled(Trouble.FLOOD), SHORT),
            cells(
                "timeout unreachable", "InternalError timeout", "connection_lost", "unreadable_answer", "unreachable"
            ),
        ),
        (Fault("answers trickle", troubled(Trouble.TRICKLE)), NOTICED_BY_NOBODY),
        (Fault("idle connections were closed", hung_up), NOTICED_BY_NOBODY),
    ],
    {"memory": "no connection", "sqlite": "a file, no connection"},
)
