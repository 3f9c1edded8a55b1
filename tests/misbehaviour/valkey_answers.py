"""What a Valkey server answers, though connections are well."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from redis.asyncio import Redis

from tests.misbehaviour.faults import POISON, Fault, Section
from tests.misbehaviour.outcomes import Away, Blamed, Done, OneRetried, Outcome
from tests.misbehaviour.stands import Stand

Made = Callable[[Stand], AbstractAsyncContextManager[None]]
SCRIPTS = (b"EVALSHA", b"EVAL")


def answers(answer: bytes | Callable[[list[bytes]], bytes], *to: bytes) -> Made:
    """These commands, or all, get this answer; the real server does not hear of them."""

    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        def fault(words: list[bytes]) -> bytes | None:
            if to and words[0].upper() not in to:
                return None
            return answer if isinstance(answer, bytes) else answer(words)

        stand.front.fault = fault
        stand.line.hang_up() if stand.line and not to else None
        yield
        stand.front.fault = None

    return make


def events_in(words: list[bytes]) -> int:
    return (int(words[2]) - 1) // 2


@asynccontextmanager
async def a_foreign_key(stand: Stand) -> AsyncIterator[None]:
    """Somebody else keeps something else where one resource belongs."""
    key = f"{stand.hands['prefix']}:default:Thing:{POISON}"
    async with Redis.from_url(stand.hands["url"]) as client:
        await client.set(key, "mine")
        yield
        await client.delete(key)


@asynccontextmanager
async def scripts_forgotten(stand: Stand) -> AsyncIterator[None]:
    async with Redis.from_url(stand.hands["url"]) as client:
        await client.script_flush()
        yield


def alone(outcome: Outcome) -> dict[str, Outcome]:
    return {"valkey": outcome}


VALKEY = Section(
    "What Valkey answers",
    [
        (Fault("it is loading its data", answers(b"-LOADING Loading the dataset\r\n")), alone(Away("LOADING"))),
        (Fault("it runs another's script", answers(b"-BUSY Busy running a script\r\n", *SCRIPTS)), alone(Away("BUSY"))),
        (Fault("it has no memory left", answers(b"-OOM command not allowed\r\n", *SCRIPTS)), alone(Away("OOM"))),
        (Fault("it may only be read", answers(b"-READONLY You can't write\r\n", *SCRIPTS)), alone(Away("READONLY"))),
        (Fault("its primary is gone", answers(b"-MASTERDOWN Link is down\r\n", *SCRIPTS)), alone(Away("MASTERDOWN"))),
        (Fault("its disk is full", answers(b"-MISCONF Errors writing\r\n", *SCRIPTS)), alone(Away("MISCONF"))),
        (Fault("the slot has moved", answers(b"-MOVED 7 127.0.0.1:1\r\n", *SCRIPTS)), alone(Away("MOVED"))),
        (Fault("the slot is moving", answers(b"-TRYAGAIN Multiple keys\r\n", *SCRIPTS)), alone(Away("TRYAGAIN"))),
        (Fault("the cluster is down", answers(b"-CLUSTERDOWN Hash slot\r\n", *SCRIPTS)), alone(Away("CLUSTERDOWN"))),
        (Fault("it wants a password", answers(b"-NOAUTH Authentication required.\r\n")), alone(Away("NOAUTH"))),
        (Fault("it forbids the command", answers(b"-NOPERM No permissions\r\n", *SCRIPTS)), alone(Away("NOPERM"))),
        (
            Fault("it has too many clients", answers(b"-ERR max number of clients reached\r\n")),
            alone(Away("disconnected")),
        ),
        (Fault("it does not know the command", answers(b"-ERR unknown command\r\n", *SCRIPTS)), alone(Away("ERR"))),
        (Fault("it has forgotten the script", scripts_forgotten), alone(Done())),
        (
            Fault("it never knows the script", answers(b"-NOSCRIPT No matching script.\r\n", b"EVALSHA")),
            alone(Done()),
        ),
        (Fault("another's key stands in one resource's place", a_foreign_key), alone(OneRetried("WRONGTYPE"))),
        (Fault("the script answers too little", answers(b"*0\r\n", *SCRIPTS)), alone(Blamed("unknown_outcome"))),
        (Fault("the script answers nothing", answers(b"_\r\n", *SCRIPTS)), alone(Blamed("unknown_outcome"))),
        (
            Fault(
                "the script answers text",
                answers(lambda words: b"$%d\r\n%s\r\n" % (events_in(words), b"x" * events_in(words)), *SCRIPTS),
            ),
            alone(Blamed("unknown_outcome")),
        ),
        (
            Fault(
                "the script answers a list of other things",
                answers(lambda words: b"*%d\r\n%s" % (events_in(words), b"$1\r\nx\r\n" * events_in(words)), *SCRIPTS),
            ),
            alone(Blamed("unknown_outcome")),
        ),
        (Fault("words of no protocol", answers(b"?what\r\n", *SCRIPTS)), alone(Away("disconnected"))),
    ],
    {
        "memory": "no server",
        "postgres": "another protocol",
        "mariadb": "another protocol",
        "sqlite": "no server",
        "opensearch": "another protocol",
        "elasticsearch": "another protocol",
        "storage": "its store's affair",
    },
    front=True,
)
