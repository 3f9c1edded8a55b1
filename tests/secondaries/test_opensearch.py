"""A search index keeps the contract, hides its tombstones, outlives their expiry, and comes back from nothing."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.content import content_digest
from outbox.errors import SettingsError, Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Rejected, ResourceDigest, Stale
from outbox.secondaries.opensearch import ElasticsearchSecondary, OpenSearchSecondary
from outbox.secondaries.opensearch_documents import alias_name, document_id, index_name
from outbox.testing.child import ServerMissing
from outbox.testing.contract import SecondaryContract
from outbox.testing.fhir import load
from outbox.testing.servers import OpenSearchServer
from outbox.testing.states import CONTENTS, at, held, remove, seen, write

ELASTICSEARCH = os.environ.get("OUTBOX_TEST_ELASTICSEARCH_URL")
PATIENT = ("acme", "Patient")
# What a dynamic mapping has no field for: empty names, names of dots, and lists or fields of two kinds at once.
NO_FIELD = frozenset({"dotted keys", "empty key", "empty values", "mixed list"})


@pytest.fixture
def prefix() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def search(opensearch_url: str, prefix: str) -> AsyncIterator[OpenSearchSecondary]:
    secondary = OpenSearchSecondary("search", opensearch_url, prefix=prefix)
    yield secondary
    await secondary.aclose()


class TestOpenSearch(SecondaryContract):
    refuses = NO_FIELD

    @pytest.fixture
    async def secondary(self, search: OpenSearchSecondary) -> OpenSearchSecondary:
        return search


@pytest.mark.skipif(not ELASTICSEARCH, reason="no Elasticsearch: set OUTBOX_TEST_ELASTICSEARCH_URL")
class TestElasticsearch(SecondaryContract):
    # Unlike OpenSearch it does not ignore an object where text was first.
    refuses = NO_FIELD | {"another shape"}

    @pytest.fixture
    async def secondary(self, prefix: str) -> AsyncIterator[ElasticsearchSecondary]:
        secondary = ElasticsearchSecondary("search", str(ELASTICSEARCH), prefix=prefix)
        yield secondary
        await secondary.aclose()


@pytest.fixture
def own_server() -> Iterator[OpenSearchServer]:
    try:
        with OpenSearchServer() as server:
            yield server
    except ServerMissing as missing:
        pytest.skip(str(missing))


class Direct:
    """What somebody does to the server behind our back."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, json=body) as response,
        ):
            return response.status, await response.json()

    async def found(self, names: str) -> int:
        await self.ask("POST", f"/{names}/_refresh")
        status, answer = await self.ask("POST", f"/{names}/_search", {"track_total_hits": True})
        assert status == 200
        return int(answer["hits"]["total"]["value"])


@pytest.fixture
def direct(opensearch_url: str) -> Direct:
    return Direct(opensearch_url)


async def test_one_poison_document_harms_none_of_the_other_499(search: OpenSearchSecondary):
    batch = [write(f"p{position:03d}", position) for position in range(1, 501)]
    batch[250] = write("p251", 251, '{"":"a field without a name"}')
    outcomes = list(await search.apply(batch))
    assert outcomes.pop(250) == Rejected("mapper_parsing_exception")
    assert outcomes == [Applied()] * 499
    assert await seen(search) == held([event for event in batch if event.position != 251])


async def test_a_stale_write_stays_refused_after_the_server_forgot_real_deletes(
    opensearch_url: str, prefix: str, direct: Direct
):
    search = OpenSearchSecondary("search", opensearch_url, prefix=prefix, settings={"index.gc_deletes": "1s"})
    await search.apply([write("p", 5)])
    assert await search.apply([remove("p", 7)]) == [Applied()]
    index = index_name(prefix, "Patient")
    await really_deleted_and_forgotten(direct, f"/{index}/_doc/witness")
    assert await search.apply([write("p", 6)]) == [Stale()]
    assert await seen(search) == []
    assert await search.content_of("Patient", "p", tenant_id="acme") is None
    await search.aclose()


async def really_deleted_and_forgotten(direct: Direct, path: str) -> None:
    """Delete a document as the server does it, and wait until an older version of it is accepted again."""
    deadline = time.monotonic() + 30
    assert (await direct.ask("PUT", f"{path}?version=5&version_type=external", {}))[0] == 201
    assert (await direct.ask("DELETE", f"{path}?version=7&version_type=external"))[0] == 200
    while (await direct.ask("PUT", f"{path}?version=6&version_type=external", {}))[0] == 409:
        assert time.monotonic() < deadline, "the server never forgot its delete"
        await asyncio.sleep(0.1)


async def test_a_search_never_shows_a_tombstone(search: OpenSearchSecondary, prefix: str, direct: Direct):
    await search.apply([write(f"p{n}", 1) for n in range(20)] + [remove(f"q{n}", 1) for n in range(20)])
    await search.apply([remove(f"p{n}", 2) for n in range(10)])
    assert await direct.found(search.search_name("Patient")) == 10
    assert await direct.found(f"{prefix}-*") == 10
    assert await direct.found(index_name(prefix, "Patient")) == 40


async def test_a_server_that_lost_everything_gets_index_mapping_and_alias_again(
    own_server: OpenSearchServer,
):
    search = OpenSearchSecondary("search", own_server.url, timeout=timedelta(seconds=2))
    direct = Direct(own_server.url)
    assert await search.apply([write("p", 1), remove("q", 2)]) == [Applied()] * 2
    _, before = await direct.ask("GET", "/all.outbox-patient")
    await asyncio.to_thread(own_server.kill)

    began = time.monotonic()
    for attempt in (search.apply([write("p", 3)]), search.check(), search.refresh(), seen(search)):
        with pytest.raises(Unavailable):
            await attempt
    assert time.monotonic() - began < 10

    await asyncio.to_thread(own_server.start)
    await search.check()
    assert await seen(search) == []
    assert await search.content_of("Patient", "p", tenant_id="acme") is None
    assert await search.apply([write("p", 3), remove("q", 4)]) == [Applied()] * 2
    assert await seen(search) == held([write("p", 3)])
    assert await direct.found(search.search_name("Patient")) == 1
    _, after = await direct.ask("GET", "/all.outbox-patient")
    for found in (before, after):
        for name in ("creation_date", "uuid"):
            del found["all.outbox-patient"]["settings"]["index"][name]
    assert after == before
    await search.aclose()


async def lose_alias(search: OpenSearchSecondary, direct: Direct) -> str:
    """Take the alias of patients away; return it."""
    alias = search.search_name("Patient")
    assert (await direct.ask("DELETE", f"/all.*/_alias/{alias}"))[0] == 200
    return alias


async def rebuild(search: OpenSearchSecondary, batch: Sequence[SyncEvent]) -> None:
    fresh = await search.fresh("fresh")
    await fresh.apply(batch)
    await fresh.switch(["Patient"])
    await fresh.drop_old()


@pytest.mark.parametrize("rebuilds", [0, 1, 2])
async def test_a_lost_alias_comes_back_and_the_guard_was_never_gone(
    search: OpenSearchSecondary, direct: Direct, rebuilds: int
):
    batch = [write("p", 1), remove("q", 5)]
    await search.apply(batch)
    for _ in range(rebuilds):
        await rebuild(search, batch)
    alias = await lose_alias(search, direct)
    assert await search.apply([write("q", 4), write("r", 6)]) == [Stale(), Applied()]
    assert await direct.found(alias) == 2


async def test_a_lost_alias_does_not_come_back_before_what_is_still_filled(search: OpenSearchSecondary, direct: Direct):
    await search.apply([write("p", 1), remove("q", 5)])
    fresh = await search.fresh("fresh")
    await fresh.apply([write("p", 1)])
    alias = await lose_alias(search, direct)
    assert await search.apply([write("q", 4)]) == [Stale()]
    assert list((await direct.ask("GET", f"/_alias/{alias}"))[1]) == [f"all.{alias}"]


async def test_a_lost_alias_is_not_guessed_between_two_indices(
    search: OpenSearchSecondary, prefix: str, direct: Direct
):
    await rebuild(search, [remove("q", 5)])
    assert (await direct.ask("PUT", f"/{index_name(prefix, 'Patient')}", {}))[0] == 200
    await lose_alias(search, direct)
    with pytest.raises(Unavailable) as caught:
        await search.apply([write("q", 4)])
    assert caught.value.code == "alias_lost"


async def test_another_index_under_our_name_is_not_written_to(search: OpenSearchSecondary, direct: Direct):
    alias = search.search_name("Patient")
    assert (await direct.ask("PUT", f"/{alias}", {}))[0] == 200
    with pytest.raises(Unavailable):
        await search.apply([write("p", 1)])
    assert await direct.found(alias) == 0


async def test_many_that_create_one_index_at_once(opensearch_url: str, prefix: str):
    everyone = [OpenSearchSecondary("search", opensearch_url, prefix=prefix) for _ in range(8)]
    batches = [[write(f"p{number}", 1)] for number in range(8)]
    applied = [one.apply(batch) for one, batch in zip(everyone, batches, strict=True)]
    assert await asyncio.gather(*applied) == [[Applied()]] * 8
    assert await seen(everyone[0]) == held(event for batch in batches for event in batch)
    for one in everyone:
        await one.aclose()


async def test_elasticsearch_goes_the_same_way(opensearch_url: str, prefix: str):
    """Beneath its client's own checks, Elasticsearch's API is the one that this server speaks."""
    search = ElasticsearchSecondary("search", opensearch_url, prefix=prefix)
    odd = write("a/b?c#%", 1, CONTENTS["decimals"])
    assert await search.apply([odd, write("b", 2), remove("c", 3)]) == [Applied()] * 3
    assert await search.apply([write("c", 2), remove("b", 4)]) == [Stale(), Applied()]
    await search.check()
    assert await seen(search) == held([odd])
    assert await search.content_of("Patient", "a/b?c#%", tenant_id="acme") == odd.content
    await search.aclose()


@pytest.mark.parametrize("name", CONTENTS.keys() - NO_FIELD)
async def test_content_is_read_back_to_the_letter(search: OpenSearchSecondary, name: str):
    event = write("p", 1, CONTENTS[name])
    assert await search.apply([event]) == [Applied()]
    found = await search.content_of("Patient", "p", tenant_id="acme")
    # White space between tokens is the server's; everything else is ours.
    assert found is not None
    assert content_digest(found) == content_digest(CONTENTS[name])
    assert found == CONTENTS[name] or "\n" in CONTENTS[name]


async def test_without_fields_to_search_every_content_is_taken(opensearch_url: str, prefix: str):
    mapping = {"type": "object", "enabled": False}
    search = OpenSearchSecondary("search", opensearch_url, prefix=prefix, mapping=mapping)
    batch = [write(name, at, text) for at, (name, text) in enumerate(CONTENTS.items(), 1)]
    assert await search.apply(batch) == [Applied()] * len(batch)
    assert await seen(search) == held(batch)
    await search.aclose()


async def test_every_shipped_fhir_resource_is_taken(search: OpenSearchSecondary):
    resources = list(load())
    batch = [
        at(position, SyncEvent.update(found.resource_type, found.resource_id, found.text))
        for position, found in enumerate(resources, 1)
    ]
    assert await search.apply(batch) == [Applied()] * len(batch)
    for resource_type in {found.resource_type for found in resources}:
        own = [event for event in batch if event.resource_type == resource_type]
        assert await seen(search, ("default", resource_type)) == held(own)


async def test_numbers_dates_and_shapes_that_dynamic_mappings_stumble_over(search: OpenSearchSecondary, direct: Direct):
    texts = [
        '{"value":5,"born":"1970-01-01","code":"5"}',
        '{"value":5.5,"born":"unknown","code":"five"}',
        '{"value":123456789012345678901234567890,"born":"1970"}',
        '{"value":"many","born":true}',
        '{"contained":[{"code":{"coding":[]}}],"entry":[{"resource":{"code":{"coding":[]}}}]}',
        '{"contained":[{"code":"text"}],"entry":[{"resource":{"code":"text"}}]}',
    ]
    batch = [write(f"p{n}", n, text) for n, text in enumerate(texts, 1)]
    assert await search.apply(batch) == [Applied()] * len(batch)
    assert await seen(search) == held(batch)
    query = {"query": {"range": {"content.value": {"gt": 5.4, "lt": 5.6}}}}
    _, answer = await direct.ask("POST", f"/{search.search_name('Patient')}/_search", query)
    assert [hit["_source"]["resource_id"] for hit in answer["hits"]["hits"]] == ["p2"]


async def shown(search: OpenSearchSecondary) -> list[ResourceDigest]:
    """Return what a scan of patients shows, which must be what `find` says of them, all at once and one by one."""
    listed = await seen(search)
    names = [*(f"p{n}" for n in range(1, 6)), "zero", *(f"o{n:04d}" for n in range(600))]
    found = await search.find(*PATIENT, names)
    assert sorted(found, key=lambda digest: digest.resource_id) == listed
    for name in names[:6]:
        assert await search.find(*PATIENT, [name]) == [digest for digest in listed if digest.resource_id == name]
    return listed


class TestAltered:
    """What another hand did to documents is found by a scan that verifies, and by find, with nothing else disturbed."""

    @pytest.fixture
    async def batch(self, search: OpenSearchSecondary) -> list[SyncEvent]:
        batch = [write(f"p{n}", n, f'{{"price":{n}.50,"tag":"x"}}') for n in range(1, 6)]
        assert await search.apply(batch) == [Applied()] * 5
        return batch

    async def test_altered_content(self, search: OpenSearchSecondary, batch: list[SyncEvent], direct: Direct):
        change = {"doc": {"content": {"price": 3.51}}}
        await direct.ask("POST", f"/{search.search_name('Patient')}/_update/acme:p3", change)
        found = await shown(search)
        assert [d.resource_id for d in found] == ["p1", "p2", "p3", "p4", "p5"]
        assert found[:2] + found[3:] == held(batch[:2] + batch[3:])
        assert found[2].digest == content_digest('{"price":3.51,"tag":"x"}')
        assert found[2].position == 3

    async def test_a_trusting_scan_reads_no_content(
        self, search: OpenSearchSecondary, opensearch_url: str, batch: list[SyncEvent], direct: Direct
    ):
        prefix = search.search_name("Patient").partition("-")[0]
        trusting = OpenSearchSecondary("search", opensearch_url, prefix=prefix, verify_content=False)
        change = {"doc": {"content": {"price": 3.51}}}
        await direct.ask("POST", f"/{search.search_name('Patient')}/_update/acme:p3", change)
        assert await shown(trusting) == held(batch)
        await trusting.aclose()

    @pytest.mark.parametrize(
        "document",
        [
            {"content": [{"price": 3.5}]},
            {"content": None},
            {"position": "many"},
            {"position": None},
            {"deleted": "false"},
            {"content": {"price": float(10**30)}},
        ],
        ids=str,
    )
    async def test_altered_fields(
        self,
        search: OpenSearchSecondary,
        batch: list[SyncEvent],
        direct: Direct,
        document: dict[str, Any],
    ):
        alias = search.search_name("Patient")
        _, answer = await direct.ask("GET", f"/{alias}/_doc/acme:p3")
        whole = {**answer["_source"], **document}
        status, _ = await direct.ask("PUT", f"/{alias}/_doc/acme:p3", whole)
        found = {digest.resource_id: digest for digest in await shown(search)}
        assert status == 200
        assert found.pop("p3", None) not in held(batch)
        assert list(found.values()) == held(batch[:2] + batch[3:])

    @pytest.mark.parametrize("name", ["tenant_id", "resource_type", "resource_id", "deleted"])
    async def test_a_missing_field_hides_one_document_and_no_other(
        self, search: OpenSearchSecondary, batch: list[SyncEvent], direct: Direct, name: str
    ):
        alias = search.search_name("Patient")
        _, answer = await direct.ask("GET", f"/{alias}/_doc/acme:p3")
        del answer["_source"][name]
        await direct.ask("PUT", f"/{alias}/_doc/acme:p3", answer["_source"])
        assert await shown(search) == held(batch[:2] + batch[3:])
        assert await search.apply([write("p3", 50)]) == [Applied()]
        assert await shown(search) == held([*batch[:2], write("p3", 50), *batch[3:]])

    async def test_a_deleted_flag_hides_and_shows(
        self, search: OpenSearchSecondary, batch: list[SyncEvent], direct: Direct
    ):
        alias = search.search_name("Patient")
        await search.apply([remove("p1", 9)])
        await direct.ask("POST", f"/{alias}/_update/acme:p1", {"doc": {"deleted": False}})
        await direct.ask("POST", f"/{alias}/_update/acme:p2", {"doc": {"deleted": True}})
        found = await shown(search)
        assert [digest.resource_id for digest in found] == ["p1", "p3", "p4", "p5"]
        assert found[0].digest != held(batch)[0].digest

    @pytest.mark.parametrize("crowd", [0, 61, 600])
    async def test_a_second_document_of_one_id_shows_as_altered(
        self, search: OpenSearchSecondary, batch: list[SyncEvent], direct: Direct, crowd: int
    ):
        # Behind 61 others one would be the last of the first page of 64, and its double the first of the next.
        others = [write(f"o{n:04d}", 9) for n in range(crowd)]
        await search.apply([*others, write("zero", 9)])
        alias = search.search_name("Patient")
        _, answer = await direct.ask("GET", f"/{alias}/_doc/acme:p3")
        await direct.ask("PUT", f"/{alias}/_doc/another", answer["_source"])
        found = await shown(search)
        assert len(found) == crowd + 6
        right = held([*others, *batch, write("zero", 9)])
        odd = [digest for digest in found if digest not in right]
        assert [digest.resource_id for digest in odd] == ["p3"]


async def test_scopes_are_where_a_listing_would_look(search: OpenSearchSecondary, opensearch_url: str, direct: Direct):
    """R5: a wrong tenant that another hand wrote is found; what is in the wrong index is in no listing."""
    await search.apply([write("p", 1), remove("q", 2, ("gone", "Patient"))])
    prefix = search.search_name("Patient").partition("-")[0]
    longer = OpenSearchSecondary("longer", opensearch_url, prefix=f"{prefix}-patient")
    await longer.apply([write("p", 2**62, place=("other", "Patient"))])
    alias = search.search_name("Patient")
    _, answer = await direct.ask("GET", f"/{alias}/_doc/acme:p")
    for changed in ({"tenant_id": "wrong"}, {"resource_type": "Organization"}, {"resource_id": None}):
        document = {**answer["_source"], "tenant_id": "elsewhere", **changed}
        await direct.ask("PUT", f"/{alias}/_doc/{next(iter(changed))}", document)
    assert sorted(await search.scopes()) == [("acme", "Patient"), ("wrong", "Patient")]
    assert (await search.highest_position(), await longer.highest_position()) == (2, 2**62)
    assert await longer.scopes() == [("other", "Patient")]
    await longer.aclose()


async def test_scopes_come_in_pages(search: OpenSearchSecondary):
    places = [(f"t{number:04d}", "Patient") for number in range(2_001)]
    for start in range(0, len(places), 500):
        await search.apply([write("p", 1, place=place) for place in places[start : start + 500]])
    assert sorted(await search.scopes()) == places


async def test_the_highest_position_is_that_of_a_tombstone_too(search: OpenSearchSecondary, direct: Direct):
    """C4: a secondary can be ahead by a delete; a position that is no number is none."""
    await search.apply([write("p", 2**62 + 1), remove("q", 2**63 - 2), write("q", 9, place=("acme", "Note"))])
    await direct.ask("PUT", f"/{search.search_name('Note')}/_doc/odd", {"position": "many", "deleted": False})
    assert await search.highest_position() == 2**63 - 2


async def test_pages_end_anywhere(search: OpenSearchSecondary):
    sizes = (7, 8, 9, 63, 64, 65, 127)
    for size in sizes:
        batch = [write(f"p{n:03d}", size, place=("acme", f"T{size}")) for n in range(size)]
        assert await search.apply(batch) == [Applied()] * size
        assert await seen(search, ("acme", f"T{size}")) == held(batch)


async def test_long_ids_of_long_tenants_stay_apart(search: OpenSearchSecondary):
    tenant = "t" * 64
    place = (tenant, "Patient")
    names = ["x" * 511 + last for last in "abc"] + ["é" * 256, "x" * 447, "x" * 448]
    batch = [write(name, at, place=place) for at, name in enumerate(names, 1)]
    assert await search.apply(batch) == [Applied()] * len(batch)
    assert await seen(search, place) == held(batch)
    assert await search.apply([remove(names[0], 9, place)]) == [Applied()]
    assert await seen(search, place) == held(batch[1:])
    assert await search.content_of("Patient", names[1], tenant_id=tenant) == batch[1].content


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)
ODD_NAMES = st.text(st.sampled_from("aAbB_.-z0é/"), min_size=1, max_size=128)
TENANTS = st.from_regex(r"[A-Za-z0-9_.-]{1,4}(/[A-Za-z0-9_.-]{1,4})?", fullmatch=True)


@given(NAMES | ODD_NAMES, NAMES | ODD_NAMES)
def test_no_two_types_share_an_index(one: str, other: str):
    names = alias_name("outbox", one), alias_name("outbox", other)
    assert (names[0] == names[1]) == (one == other)
    for name in (*names, index_name("p" * 50, one)):
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")
        assert len(name) <= 255


@given(st.tuples(TENANTS, NAMES), st.tuples(TENANTS, NAMES))
def test_no_two_resources_share_a_document(one: tuple[str, str], other: tuple[str, str]):
    assert (document_id(*one) == document_id(*other)) == (one == other)


@pytest.mark.parametrize(
    ("resource_type", "name"),
    [
        ("Patient", "outbox-patient"),
        ("patient", "outbox-_patient"),
        ("MedicationRequest", "outbox-medication_request"),
        ("Medicationrequest", "outbox-medicationrequest"),
        ("a.b", "outbox-_a.2eb"),
        ("Ä", "outbox-.c3.84"),
    ],
)
def test_names_to_search(resource_type: str, name: str):
    assert alias_name("outbox", resource_type) == name


def test_the_form_of_long_ids_cannot_be_taken_by_a_short_one():
    long = document_id("acme", "x" * 512)
    assert len(long.encode()) <= 512
    assert document_id("acme", long.removeprefix("acme#")) == f"acme:{long.removeprefix('acme#')}"
    assert document_id("acme", long) != long


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prefix", {"prefix": "Upper"}),
        ("prefix", {"prefix": "-dash"}),
        ("prefix", {"prefix": "a.b"}),
        ("prefix", {"prefix": "x" * 51}),
        ("bulk_bytes", {"bulk_bytes": 0}),
        ("timeout", {"timeout": timedelta(0)}),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, arguments: dict[str, Any]):
    with pytest.raises(SettingsError) as caught:
        OpenSearchSecondary("search", "http://127.0.0.1:9", **arguments)
    assert caught.value.field == field


async def test_mapping_and_settings_of_ones_own(opensearch_url: str, prefix: str, direct: Direct):
    def mapping(resource_type: str) -> dict[str, Any]:
        return {"dynamic": False, "properties": {resource_type: {"type": "keyword"}}}

    settings = {"index.number_of_shards": 3}
    search = OpenSearchSecondary("search", opensearch_url, prefix=prefix, mapping=mapping, settings=settings)
    batch = [write(f"p{n}", n) for n in range(1, 80)]
    assert await search.apply(batch) == [Applied()] * 79
    assert await seen(search) == held(batch)
    _, answer = await direct.ask("GET", f"/{index_name(prefix, 'Patient')}")
    (index,) = answer.values()
    assert list(index["mappings"]["properties"]["content"]["properties"]) == ["Patient"]
    assert index["settings"]["index"]["number_of_shards"] == "3"
    await search.aclose()


async def test_a_search_finds_resources_by_their_content(search: OpenSearchSecondary, direct: Direct):
    content = {"name": [{"family": "Lovelace", "given": ["Ada"]}], "active": True}
    await search.apply([write("ada", 1, json.dumps(content)), write("other", 2)])
    await search.refresh()
    query = {"query": {"match": {"content.name.family": "lovelace"}}}
    _, answer = await direct.ask("POST", f"/{search.search_name('Patient')}/_search", query)
    (hit,) = answer["hits"]["hits"]
    assert (hit["_id"], hit["_source"]["content"]) == ("acme:ada", content)
