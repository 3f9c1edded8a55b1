"""Search secondaries against a real HTTP server that answers whatever a test wants it to answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import encode_basic_auth, web
from elasticsearch import AsyncElasticsearch
from opensearchpy import AsyncOpenSearch

from outbox.errors import Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Stale
from outbox.secondaries.opensearch import ElasticsearchSecondary, OpenSearchSecondary
from outbox.secondaries.opensearch_answer import retry_after_of
from outbox.testing.states import remove, write

Search = OpenSearchSecondary | ElasticsearchSecondary
Items = list[dict[str, Any]]

UNKNOWN = Retry("unknown_outcome")


def refused(code: str, after: timedelta | None = None) -> Retry:
    """What becomes of a document that the cluster or its index would not take."""
    return Retry(code, "the search server refused the document for reasons of its own", after, blameless=True)


SHORT = timedelta(seconds=1)


class SearchServer:
    """Answers `_bulk` as `bulk` says, which gets one successful item for every action of the request."""

    def __init__(self) -> None:
        self.bulk: Callable[[Items], Any] = answered
        self.search: Callable[[], Any] = found_nothing
        self.create: Callable[[], web.Response] = lambda: web.json_response({"acknowledged": True})
        self.bulks: list[Items] = []
        self.sizes: list[int] = []
        self.created: list[str] = []
        self.preferences: list[str] = []
        self.elsewhere = 0
        self.authorization: set[str | None] = set()
        self.url = ""
        self.over = asyncio.Event()

    async def on_bulk(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        lines = [json.loads(line) for line in body.splitlines()]
        items = [item_of(action["index"]) for action in lines[::2]]
        self.bulks.append(items)
        self.sizes.append(len(body))
        self.authorization.add(request.headers.get("Authorization"))
        made = self.bulk(items)
        if made is None:
            request.transport.abort()
            return web.Response()
        return await made if asyncio.iscoroutine(made) else made

    async def on_search(self, request: web.Request) -> web.StreamResponse:
        self.preferences.append(request.query["preference"])
        return self.search()

    async def on_aliases(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"all.outbox-patient": {"aliases": {"outbox-patient": {}}}})

    async def on_layout(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async def on_elsewhere(self, request: web.Request) -> web.StreamResponse:
        self.elsewhere += 1
        return web.json_response({"errors": False, "items": []})

    async def on_other(self, request: web.Request) -> web.StreamResponse:
        if request.method == "PUT":
            self.created.append(request.path.removeprefix("/"))
            return self.create()
        return web.json_response({"acknowledged": True, "_shards": {"failed": 0}})

    async def hang(self) -> web.Response:
        await self.over.wait()
        return web.Response()


def item_of(action: dict[str, Any]) -> dict[str, Any]:
    place = {"_index": action["_index"], "_id": action["_id"]}
    return {"index": {**place, "_version": action["version"], "result": "created", "status": 201}}


def failed(item: dict[str, Any], status: int, kind: str) -> dict[str, Any]:
    """Return the item as a failure whose reason quotes a value, as real ones do."""
    error = {"type": kind, "reason": "failed to parse field [n] of value 'secret'"}
    place = {name: item["index"][name] for name in ("_index", "_id")}
    return {"index": {**place, "status": status, "error": error}}


def answered(items: Items, **headers: str) -> web.Response:
    return web.json_response({"took": 1, "errors": False, "items": items}, headers=headers)


def page(**changed: Any) -> dict[str, Any]:
    return {"timed_out": False, "_shards": {"failed": 0}, "hits": {"hits": []}, **changed}


def found_nothing() -> web.Response:
    return web.json_response(page())


@pytest.fixture
async def server() -> AsyncIterator[SearchServer]:
    async with running(SearchServer()) as server:
        yield server


@asynccontextmanager
async def running(server: SearchServer) -> AsyncIterator[SearchServer]:
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/_bulk", server.on_bulk)
    app.router.add_post("/{name}/_search", server.on_search)
    app.router.add_get("/_alias/{name}", server.on_aliases)
    app.router.add_get("/{name}/_alias", server.on_layout)
    app.router.add_route("*", "/elsewhere", server.on_elsewhere)
    app.router.add_route("*", "/{rest:.*}", server.on_other)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        server.over.set()
        await runner.cleanup()


@pytest.fixture(params=[OpenSearchSecondary, ElasticsearchSecondary])
def kind(request: pytest.FixtureRequest) -> type[Search]:
    return request.param


@pytest.fixture
async def search(kind: type[Search], server: SearchServer) -> AsyncIterator[Search]:
    secondary = kind("search", server.url)
    yield secondary
    await secondary.aclose()


@pytest.fixture
async def impatient(kind: type[Search], server: SearchServer) -> AsyncIterator[Search]:
    secondary = kind("search", server.url, timeout=SHORT)
    yield secondary
    await secondary.aclose()


def batch(size: int) -> list[SyncEvent]:
    return [write(f"p{position}", position) for position in range(1, size + 1)]


async def refusal(search: Search, size: int = 2) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        await search.apply(batch(size))
    return caught.value


async def test_a_good_answer_is_applied(search: Search, server: SearchServer):
    assert await search.apply([*batch(2), remove("q", 9)]) == [Applied()] * 3
    assert [item["index"]["_version"] for item in server.bulks[0]] == [1, 2, 9]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param(lambda i: i[1:], [UNKNOWN] * 3, id="first-missing"),
        pytest.param(lambda i: i[:-1], [UNKNOWN] * 3, id="last-missing"),
        pytest.param(lambda i: [*i, i[0]], [UNKNOWN] * 3, id="extra"),
        pytest.param(lambda i: [], [UNKNOWN] * 3, id="none"),
        pytest.param(lambda i: [i[1], i[0], i[2]], [UNKNOWN, UNKNOWN, Applied()], id="reordered"),
        pytest.param(lambda i: [i[0], i[0], i[2]], [Applied(), UNKNOWN, Applied()], id="duplicate"),
    ],
)
async def test_items_are_checked_against_the_request(
    search: Search,
    server: SearchServer,
    changed: Callable[[Items], Items],
    expected: list[Outcome],
):
    server.bulk = lambda items: answered(changed(items))
    assert await search.apply(batch(3)) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"_index": "outbox-other"},
        {"_id": "acme:p2"},
        {"_version": 2},
        {"_version": None},
        {"status": 202},
        {"status": 0},
        {"status": 500},
    ],
    ids=str,
)
async def test_an_item_that_does_not_fit_is_unknown_alone(
    search: Search, server: SearchServer, changed: dict[str, Any]
):
    server.bulk = lambda items: answered([{"index": {**items[0]["index"], **changed}}, items[1]])
    assert await search.apply([write("p1", 1), write("p3", 3)]) == [UNKNOWN, Applied()]


@pytest.mark.parametrize(
    "text",
    [
        "<html>502 Bad Gateway</html>",
        "",
        "[]",
        "null",
        '{"errors":false,"items":[{"index":{"_index":"outbox-patient","_id":"acme:p1","stat',
    ],
)
async def test_a_200_that_is_no_json_object_is_no_search_server_s_word(search: Search, server: SearchServer, text: str):
    """B3: a page that says "back soon" costs no event an attempt."""
    server.bulk = lambda _: web.Response(text=text, content_type="text/html", headers={"Retry-After": "7"})
    error = await refusal(search)
    assert (error.code, error.retry_after) == ("unreadable_answer", timedelta(seconds=7))


@pytest.mark.parametrize(
    "text",
    [
        '{"items":null}',
        '{"acknowledged":true}',
        '{"items":[{"create":{}},{"create":{}}]}',
        '{"items":[7,8]}',
        '{"items":[{"index":{"_index":"outbox-patient","_id":"acme:p1","status":"201"}},{}]}',
    ],
)
async def test_a_200_that_is_no_bulk_answer_leaves_everything_unknown(search: Search, server: SearchServer, text: str):
    server.bulk = lambda _: web.Response(text=text, content_type="text/html")
    assert await search.apply(batch(2)) == [UNKNOWN] * 2


@pytest.mark.parametrize(
    ("status", "kind_of_error", "expected"),
    [
        (409, "version_conflict_engine_exception", Stale()),
        (409, "something_else", Retry("something_else")),
        (400, "mapper_parsing_exception", Rejected("mapper_parsing_exception")),
        (404, "document_missing_exception", Rejected("document_missing_exception")),
        (413, "too_long", Rejected("too_long")),
        (400, "Quoted 'secret' value", Rejected("unnamed_error")),
        (400, "index_closed_exception", refused("index_closed_exception")),
        (403, "cluster_block_exception", refused("cluster_block_exception")),
        (429, "rejected_execution_exception", refused("rejected_execution_exception")),
        (503, "unavailable_shards_exception", refused("unavailable_shards_exception")),
        (429, "circuit_breaking_exception", refused("circuit_breaking_exception")),
        (500, "null_pointer_exception", Retry("null_pointer_exception")),
    ],
)
async def test_every_item_has_its_own_outcome(
    search: Search, server: SearchServer, status: int, kind_of_error: str, expected: Outcome
):
    server.bulk = lambda items: answered([items[0], failed(items[1], status, kind_of_error)])
    assert await search.apply(batch(2)) == [Applied(), expected]


async def test_an_item_error_of_its_own_never_blames_the_secondary(search: Search, server: SearchServer):
    server.bulk = lambda items: answered([failed(items[0], 500, "null_pointer_exception")])
    assert await search.apply(batch(1)) == [Retry("null_pointer_exception")]


@pytest.mark.parametrize(
    ("status", "kind_of_error"),
    [
        (503, "unavailable_shards_exception"),
        (403, "cluster_block_exception"),
        (429, "circuit_breaking_exception"),
        (503, "nobody_ever_heard_of_it"),
    ],
)
async def test_what_the_cluster_refuses_is_no_fault_of_the_documents(
    search: Search, server: SearchServer, status: int, kind_of_error: str
):
    """Guarantee 8: an outage costs no event its attempts, whatever the server calls it."""
    refuse = {"Retry-After": "7"}
    server.bulk = lambda items: answered([failed(item, status, kind_of_error) for item in items], **refuse)
    assert await search.apply(batch(2)) == [refused(kind_of_error, timedelta(seconds=7))] * 2


async def test_a_throttled_item_carries_the_wait(search: Search, server: SearchServer):
    kind = "rejected_execution_exception"
    server.bulk = lambda i: answered([i[0], failed(i[1], 429, kind)], **{"Retry-After": "7"})
    outcomes = await search.apply(batch(2))
    assert outcomes == [Applied(), refused(kind, timedelta(seconds=7))]


async def test_a_missing_index_is_created_and_the_write_repeated(search: Search, server: SearchServer):
    def lose_the_second(items: Items) -> web.Response:
        if server.created:
            return answered(items)
        return answered([items[0], failed(items[1], 404, "index_not_found_exception")])

    server.bulk = lose_the_second
    events = [write("p1", 1), write("o1", 2, place=("acme", "Organization"))]
    assert await search.apply(events) == [Applied()] * 2
    assert server.created == ["all.outbox-organization"]
    assert [len(items) for items in server.bulks] == [2, 1]


def without_organizations(items: Items) -> web.Response:
    kind = "index_not_found_exception"
    return answered([failed(i, 404, kind) if "organ" in i["index"]["_index"] else i for i in items])


async def test_an_index_that_stays_missing_is_tried_again_later(search: Search, server: SearchServer):
    server.bulk = without_organizations
    events = [write("p1", 1), write("o1", 2, place=("acme", "Organization"))]
    assert await search.apply(events) == [Applied(), refused("index_not_found_exception")]
    assert len(server.bulks) == 2


async def test_an_index_that_may_not_be_created_fails_what_needs_it(search: Search, server: SearchServer):
    server.bulk = without_organizations
    server.create = lambda: web.Response(status=403)
    events = [write("p1", 1), write("o1", 2, place=("acme", "Organization"))]
    assert await search.apply(events) == [Applied(), refused("index_not_found_exception")]
    with pytest.raises(Unavailable) as caught:
        await search.apply(events[1:])
    assert caught.value.code == "forbidden"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "http_500"),
        (502, "http_502"),
        (503, "http_503"),
        (504, "http_504"),
        (401, "unauthorized"),
        (403, "forbidden"),
        (429, "throttled"),
        (400, "http_400"),
        (404, "http_404"),
        (304, "redirected"),
    ],
)
async def test_a_refused_request_is_asked_once_and_blames_no_event(
    search: Search, server: SearchServer, status: int, code: str
):
    server.bulk = lambda _: web.Response(status=status)
    error = await refusal(search)
    assert (error.code, error.retry_after) == (code, None)
    assert len(server.bulks) == 1


async def test_a_refused_request_names_the_servers_own_word(search: Search, server: SearchServer):
    body = {"error": {"type": "illegal_argument_exception", "reason": "secret"}, "status": 400}
    server.bulk = lambda _: web.json_response(body, status=400)
    error = await refusal(search)
    assert error.code == "illegal_argument_exception"
    assert "secret" not in str(error)


async def test_a_throttled_request_carries_the_wait(search: Search, server: SearchServer):
    server.bulk = lambda _: web.Response(status=429, headers={"Retry-After": "12"})
    error = await refusal(search)
    assert (error.code, error.retry_after) == ("throttled", timedelta(seconds=12))


NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", timedelta(0)),
        (" 30 ", timedelta(seconds=30)),
        ("3601", timedelta(hours=1)),
        ("9" * 5000, timedelta(hours=1)),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), timedelta(seconds=90)),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), timedelta(0)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", timedelta(hours=1)),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("٣", None),
        ("Mon, 99 Foo 2026 99:99:99 GMT", None),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_retry_after_is_read_clamped_or_ignored(value: str, expected: timedelta | None):
    """B4: seconds and dates; negative, huge, fractional and garbled."""
    headers = {"Retry-After": value, "Date": format_datetime(NOW, usegmt=True)}
    assert retry_after_of(headers) == expected


def test_without_the_answers_date_our_clock_stands_in():
    later = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    wait = retry_after_of({"Retry-After": later})
    assert wait is not None
    assert timedelta(minutes=9) < wait <= timedelta(minutes=10)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed(search: Search, server: SearchServer, status: int):
    headers = {"Location": f"{server.url}/elsewhere"}
    server.bulk = lambda _: web.Response(status=status, headers=headers)
    assert (await refusal(search)).code == "redirected"
    assert (server.elsewhere, len(server.bulks)) == (0, 1)


async def test_a_reset_connection_is_asked_once(search: Search, server: SearchServer):
    server.bulk = lambda _: None
    assert (await refusal(search)).code == "connection_lost"
    assert len(server.bulks) == 1


async def test_a_server_that_resets_before_it_reads(kind: type[Search]):
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(reset, "127.0.0.1", 0) as resetting:
        port = resetting.sockets[0].getsockname()[1]
        search = kind("search", f"http://127.0.0.1:{port}")
        assert (await refusal(search)).code == "connection_lost"
        await search.aclose()


async def test_an_answer_cut_short_on_the_wire(impatient: Search, server: SearchServer):
    async def cut(items: Items) -> web.StreamResponse:
        return web.Response(body=answered(items).body, headers={"Content-Length": "10000"})

    server.bulk = cut
    assert (await refusal(impatient)).code in {"connection_lost", "timeout"}


async def test_a_server_that_never_answers(impatient: Search, server: SearchServer):
    server.bulk = lambda _: server.hang()
    async with asyncio.timeout(10 * SHORT.total_seconds()):
        assert (await refusal(impatient)).code == "timeout"
    assert len(server.bulks) == 1


async def test_nobody_listens(kind: type[Search]):
    async with running(SearchServer()) as gone:
        url = gone.url
    search = kind("search", url)
    assert (await refusal(search)).code == "refused"
    with pytest.raises(Unavailable):
        await search.check()
    await search.aclose()


async def test_cancelling_passes_through(search: Search, server: SearchServer):
    asked = asyncio.Event()

    def hang(_: Items) -> Any:
        asked.set()
        return server.hang()

    server.bulk = hang
    applying = asyncio.create_task(search.apply(batch(1)))
    await asked.wait()
    applying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await applying


async def test_a_body_too_large_is_halved_in_order_down_to_the_one(search: Search, server: SearchServer):
    def at_most_three_without_p5(items: Items) -> web.Response:
        if len(items) > 3 or any(item["index"]["_id"].endswith(":p5") for item in items):
            return web.Response(status=413)
        return answered(items)

    server.bulk = at_most_three_without_p5
    outcomes = await search.apply(batch(12))
    assert outcomes == [Applied()] * 4 + [Rejected("too_large")] + [Applied()] * 7
    tried = [item["index"]["_version"] for items in server.bulks for item in items]
    assert [p for n, p in enumerate(tried) if p not in tried[n + 1 :]] == list(range(1, 13))


async def test_bodies_are_capped_and_keep_the_order(kind: type[Search], server: SearchServer):
    search = kind("search", server.url, bulk_bytes=2_000)
    assert await search.apply(batch(40)) == [Applied()] * 40
    assert len(server.bulks) > 3
    assert max(server.sizes) <= 2_000
    positions = [item["index"]["_version"] for items in server.bulks for item in items]
    assert positions == list(range(1, 41))
    await search.aclose()


async def test_what_is_known_is_kept_when_a_later_body_fails(kind: type[Search], server: SearchServer):
    def second_fails(items: Items) -> web.Response:
        if len(server.bulks) > 1:
            return web.Response(status=503, headers={"Retry-After": "5"})
        return answered(items)

    server.bulk = second_fails
    search = kind("search", server.url, bulk_bytes=1)
    with pytest.raises(Unavailable) as caught:
        await search.apply(batch(4))
    assert (caught.value.code, caught.value.known, caught.value.retry_after) == (
        "http_503",
        [Applied()],
        timedelta(seconds=5),
    )
    assert len(server.bulks) == 2
    await search.aclose()


@pytest.mark.parametrize(
    "body",
    [
        page(timed_out=True),
        page(_shards={"failed": 1}),
        {"timed_out": False, "hits": {"hits": []}},
        {"hits": {"hits": []}},
        {},
    ],
    ids=["timed-out", "failed-shards", "no-shards", "nothing-said", "empty"],
)
async def test_a_listing_that_may_be_short_is_no_listing(search: Search, server: SearchServer, body: dict[str, Any]):
    assert [found async for found in search.scan("acme", "Patient")] == []
    server.search = lambda: web.json_response(body)
    for ask in questions(search):
        with pytest.raises(Unavailable):
            await ask


def questions(search: Search) -> Iterator[Awaitable[Any]]:
    async def listing() -> list[ResourceDigest]:
        return [found async for found in search.scan("acme", "Patient")]

    yield listing()
    yield search.find("acme", "Patient", ["p"])
    yield search.scopes()
    yield search.highest_position()


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_an_index_that_goes_away_in_the_middle_ends_no_listing(search: Search, server: SearchServer, status: int):
    error = {"error": {"type": "index_not_found_exception"}, "status": status}
    server.search = lambda: web.json_response(error, status=status)
    for ask in questions(search):
        with pytest.raises(Unavailable):
            await ask


async def test_searches_ask_copies_that_a_refresh_makes_new(search: Search, server: SearchServer):
    """Where replicas copy segments, one may lag behind a refresh; only OpenSearch knows that and offers primaries."""
    for _ in range(2):
        assert await search.find("acme", "Patient", ["p"]) == []
    assert server.preferences == ["_primary" if isinstance(search, OpenSearchSecondary) else "outbox-scan"] * 2


async def test_a_server_that_offers_no_primaries_is_asked_without_them_from_then_on(server: SearchServer):
    def before_2_8() -> web.Response:
        error = {"error": {"type": "illegal_argument_exception"}, "status": 400}
        return web.json_response(error, status=400) if server.preferences[-1] == "_primary" else found_nothing()

    server.search = before_2_8
    search = OpenSearchSecondary("search", server.url)
    at_once = [search.find("acme", "Patient", ["p"]) for _ in range(2)]
    assert await asyncio.gather(*at_once) == [[], []]
    server.preferences.clear()
    assert await search.find("acme", "Patient", ["p"]) == []
    assert server.preferences == ["outbox-scan"]
    await search.aclose()


async def test_a_refusal_for_another_reason_does_not_end_the_asking_of_primaries(server: SearchServer):
    error = {"error": {"type": "illegal_argument_exception"}, "status": 400}
    server.search = lambda: web.json_response(error, status=400)
    search = OpenSearchSecondary("search", server.url)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await search.find("acme", "Patient", ["p"])
    assert server.preferences == ["_primary", "outbox-scan"] * 2
    await search.aclose()


async def test_credentials_of_a_client_reach_the_server(server: SearchServer):
    given = ("ada", "secret word")
    expected = encode_basic_auth(*given)
    elastic = AsyncElasticsearch(server.url, basic_auth=given)
    opensearch = AsyncOpenSearch(server.url, http_auth=given)
    for search in (
        ElasticsearchSecondary("search", elastic),
        OpenSearchSecondary("search", opensearch),
    ):
        server.authorization.clear()
        assert await search.apply(batch(1)) == [Applied()]
        assert server.authorization == {expected}
        await search.aclose()
    # A client handed in is not ours to close.
    (connection,) = opensearch.transport.connection_pool.connections
    assert not connection.session.closed
    (node,) = elastic.transport.node_pool.all()
    assert not node.session.closed
    await opensearch.close()
    await elastic.close()


async def test_no_log_line_holds_content(search: Search, server: SearchServer, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    event = write("p1", 1, '{"name":"Ada Unmistakable"}')
    server.search = lambda: web.json_response({"name": "Ada Unmistakable"})
    await search.apply([event])
    with pytest.raises(Unavailable):
        [found async for found in search.scan("acme", "Patient")]
    server.bulk = lambda _: web.Response(status=503, text="Ada Unmistakable")
    with pytest.raises(Unavailable):
        await search.apply([event])
    server.bulk = lambda _: None
    with pytest.raises(Unavailable):
        await search.apply([event])
    assert "Unmistakable" not in caplog.text
