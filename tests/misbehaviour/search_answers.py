"""What a server of HTTP answers, though connections are well."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from aiohttp import web

from tests.misbehaviour.faults import POISON, Fault, Rows, Section
from tests.misbehaviour.fronts import Doing, Item, bulk_items
from tests.misbehaviour.outcomes import Away, Blamed, Done, OneDead, OneRetried, Outcome
from tests.misbehaviour.stands import Stand

Made = Callable[[Stand], AbstractAsyncContextManager[None]]
PAGE = "<html><body>502 Bad Gateway</body></html>"


def fronted(fault: Doing) -> Made:
    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        stand.front.fault = fault
        yield
        stand.front.fault = None
        assert stand.front.elsewhere == 0, "a redirect was followed"

    return make


def answers(status: int = 200, text: str = "", media: str = "application/json", **headers: str) -> Made:
    """Every request gets this answer; the real server hears of none."""

    async def fault(request: web.Request, passed: Any) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, text=text, content_type=media, headers=named)

    return fronted(fault)


def of_bulk(change: Callable[[web.Response], web.Response]) -> Made:
    """The real server does everything; what it answers to a bulk request is changed."""

    async def fault(request: web.Request, passed: Any) -> web.Response:
        answer = await passed()
        return change(answer) if request.path == "/_bulk" else answer

    return fronted(fault)


def of_items(change: Callable[[list[Item]], list[Item]]) -> Made:
    return of_bulk(lambda answer: web.json_response({"took": 1, "errors": True, "items": change(bulk_items(answer))}))


def failed(item: Item, status: int, kind: str) -> Item:
    place = {name: item["index"][name] for name in ("_index", "_id")}
    return {"index": {**place, "status": status, "error": {"type": kind, "reason": "secret"}}}


def poisoned(status: int, kind: str) -> Made:
    def change(items: list[Item]) -> list[Item]:
        return [failed(item, status, kind) if item["index"]["_id"].endswith(POISON) else item for item in items]

    return of_items(change)


async def too_large(request: web.Request, passed: Any) -> web.Response:
    if POISON.encode() in await request.read():
        return web.Response(status=413)
    answer: web.Response = await passed()
    return answer


def half(answer: web.Response) -> web.Response:
    assert isinstance(answer.body, bytes)
    return web.Response(body=answer.body[: len(answer.body) // 2], content_type="application/json")


def zipped(answer: web.Response) -> web.Response:
    assert isinstance(answer.body, bytes)
    return web.Response(body=gzip.compress(answer.body), headers={"Content-Encoding": "gzip"})


def both(outcome: Outcome) -> dict[str, Outcome]:
    return {"opensearch": outcome, "elasticsearch": outcome}


def statuses() -> Rows:
    codes = {400: "http_400", 401: "unauthorized", 403: "forbidden", 404: "http_404", 408: "http_408", 410: "http_410"}
    codes |= {422: "http_422", 429: "throttled", 500: "http_500", 502: "http_502", 503: "http_503", 504: "http_504"}
    rows: Rows = [
        (Fault(f"{status}", answers(status, PAGE, "text/html")), both(Away(code))) for status, code in codes.items()
    ]
    for wait in ("1", "Fri, 31 Dec 9999 23:59:59 GMT", "soon"):
        rows.append((Fault(f"429, `Retry-After: {wait}`", answers(429, Retry_After=wait)), both(Away("throttled"))))
    rows += [
        (Fault(f"{status} to somewhere else", answers(status, Location="/elsewhere")), both(Away("redirected")))
        for status in (301, 302, 307)
    ]
    return rows


async def untouched(request: web.Request, passed: Any) -> web.Response:
    answer: web.Response = await passed()
    return answer


BOMB = gzip.compress(b" " * 2**24)

HTTP = Section(
    "What a search server answers",
    [
        *statuses(),
        (Fault("413 to one document", fronted(too_large)), both(OneDead("too_large"))),
        (Fault("200 with HTML", answers(200, PAGE, "text/html")), both(Away("unreadable_answer"))),
        (Fault("200 with nothing", answers(200)), both(Away("unreadable_answer"))),
        (Fault("200 with half of the answer", of_bulk(half)), both(Away("unreadable_answer"))),
        (
            Fault("200 with JSON of another shape", answers(200, '{"acknowledged":true}')),
            both(Blamed("unknown_outcome")),
        ),
        (Fault("200 and no item", of_items(lambda items: [])), both(Blamed("unknown_outcome"))),
        (Fault("200, the last item is missing", of_items(lambda items: items[:-1])), both(Blamed("unknown_outcome"))),
        (Fault("200, an item too many", of_items(lambda items: [*items, items[0]])), both(Blamed("unknown_outcome"))),
        (
            Fault("200, items in another order", of_items(lambda items: items[::-1])),
            both(Blamed("unknown_outcome")),
        ),
        (
            Fault("200, one item for all", of_items(lambda items: [failed(items[0], 201, "x")] * len(items))),
            both(Blamed("unknown_outcome")),
        ),
        (
            Fault("200, ids of others", of_items(lambda items: [{"index": {**i["index"], "_id": "o"}} for i in items])),
            both(Blamed("unknown_outcome")),
        ),
        (
            Fault("200, one item failed with 500", poisoned(500, "null_pointer_exception")),
            both(OneRetried("null_pointer_exception")),
        ),
        (
            Fault(
                "200, every item throttled",
                of_items(lambda items: [failed(item, 429, "rejected_execution_exception") for item in items]),
            ),
            both(Away("rejected_execution_exception")),
        ),
        (
            Fault(
                "200, the index is read-only",
                of_items(lambda items: [failed(item, 403, "cluster_block_exception") for item in items]),
            ),
            both(Away("cluster_block_exception")),
        ),
        (
            Fault("a document that does not fit the mapping", fronted(untouched), poison='{"":1}'),
            both(OneDead("mapper_parsing_exception")),
        ),
        (Fault("a gzip answer", of_bulk(zipped)), both(Done())),
        (
            Fault("plain text said to be gzip", answers(200, "{}", Content_Encoding="gzip")),
            both(Away("connection_lost")),
        ),
        (
            Fault(
                "16 MiB of blanks from 16 KiB of gzip",
                of_bulk(lambda _: web.Response(body=BOMB, headers={"Content-Encoding": "gzip"})),
            ),
            both(Away("unreadable_answer")),
        ),
        (
            Fault(
                "bytes that are no UTF-8",
                of_bulk(lambda _: web.Response(body=b'{"items":"\xff"}', content_type="application/json")),
            ),
            both(Away("unreadable_answer")),
        ),
    ],
    {
        "memory": "no server",
        "postgres": "speaks no HTTP",
        "mariadb": "speaks no HTTP",
        "sqlite": "no server",
        "valkey": "speaks no HTTP",
        "storage": "its store's affair",
    },
    front=True,
)
