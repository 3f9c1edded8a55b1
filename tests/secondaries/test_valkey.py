"""Valkey keeps the contract, in one round trip a batch, and says what is wrong when it cannot."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import SettingsError, Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, ResourceDigest, Stale
from outbox.secondaries.valkey import ValkeySecondary
from outbox.testing.contract import SecondaryContract
from outbox.testing.servers import ValkeyServer
from outbox.testing.states import CONTENTS, held, remove, seen, write
from tests.comparing import World, said


class TestValkey(SecondaryContract):
    @pytest.fixture
    async def secondary(self, valkey_url: str) -> AsyncIterator[ValkeySecondary]:
        secondary = ValkeySecondary("cache", valkey_url, uuid4().hex)
        yield secondary
        await secondary.aclose()


class TestValkeyByAClientThatDecodes(SecondaryContract):
    @pytest.fixture
    async def secondary(self, valkey_url: str) -> AsyncIterator[ValkeySecondary]:
        async with Redis.from_url(valkey_url, decode_responses=True, protocol=2) as client:
            yield ValkeySecondary("cache", client, "{" + uuid4().hex + "}")


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(appendonly=True) as server:
        yield server


@pytest.fixture
async def client(server: ValkeyServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
async def cache(client: Redis) -> ValkeySecondary:
    await client.flushall()
    return ValkeySecondary("cache", client, "cache")


@pytest.fixture
async def remote(server: ValkeyServer) -> AsyncIterator[ValkeySecondary]:
    """A secondary of a server that a test may hurt."""
    secondary = ValkeySecondary("cache", server.url, uuid4().hex, timeout=timedelta(seconds=0.5))
    yield secondary
    await secondary.aclose()


async def _code(secondary: ValkeySecondary) -> str:
    with pytest.raises(Unavailable) as caught:
        await secondary.apply([write("p", 99)])
    return caught.value.code


async def test_a_batch_is_one_round_trip(cache: ValkeySecondary, client: Redis):
    await cache.apply([write("p", 1)])
    await client.config_resetstat()
    await cache.apply([write(f"p{number}", 1) for number in range(500)])
    calls = await client.info("commandstats")
    assert calls["cmdstat_evalsha"]["calls"] == 1
    assert "cmdstat_eval" not in calls


async def test_a_batch_above_the_limit_is_several_scripts(cache: ValkeySecondary, client: Redis):
    await cache.apply([write("p", 1)])
    await client.config_resetstat()
    batch = [write(f"p{number}", 2, CONTENTS["long text"]) for number in range(50)]
    megabytes = sum(len(event.content.encode()) for event in batch) / 2**20
    assert list(await cache.apply(batch)) == [Applied()] * 50
    calls = (await client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    assert megabytes / 4 <= calls <= megabytes / 4 + 2


async def test_a_server_that_forgot_the_script_gets_it_again(cache: ValkeySecondary, client: Redis):
    await cache.apply([write("p", 1)])
    await client.script_flush()
    assert list(await cache.apply([write("p", 2), write("q", 1)])) == [Applied(), Applied()]
    await client.script_flush()
    assert list(await cache.apply([write("p", 1), write("q", 2)])) == [Stale(), Applied()]


async def test_what_is_stored_is_for_others_to_read(cache: ValkeySecondary, client: Redis):
    event = write("a:b%c", 2**62 + 1, place=("acme/eu", "Patient"))
    await cache.apply([event])
    fields = await client.hgetall("cache:acme/eu:Patient:a%3Ab%25c")
    assert fields == {b"position": b"4611686018427387905", b"content": event.content.encode(), b"version": b"7"}
    assert await client.zrange("cache:acme/eu:Patient", 0, -1) == [b"a:b%c"]


@pytest.mark.parametrize("name", CONTENTS)
async def test_content_of_gives_back_every_letter(cache: ValkeySecondary, name: str):
    await cache.apply([write("p", 1, CONTENTS[name])])
    assert await cache.content_of("Patient", "p", tenant_id="acme") == CONTENTS[name]
    assert await cache.content_of("Patient", "p") is None


async def test_a_tombstone_expires_and_is_not_in_the_index(cache: ValkeySecondary, client: Redis):
    await cache.apply([write("p", 1), remove("q", 1)])
    await cache.apply([remove("p", 2)])
    for name in ("p", "q"):
        left = timedelta(milliseconds=await client.pttl(f"cache:acme:Patient:{name}"))
        assert timedelta(days=6, hours=23) < left <= timedelta(days=7)
        assert await cache.content_of("Patient", name, tenant_id="acme") is None
    assert await client.hgetall("cache:acme:Patient:p") == {b"position": b"2"}
    assert not await client.exists("cache:acme:Patient")


async def test_what_was_created_again_does_not_expire(cache: ValkeySecondary, client: Redis):
    await cache.apply([remove("p", 1)])
    await cache.apply([write("p", 2)])
    assert await client.pttl("cache:acme:Patient:p") == -1
    await cache.apply([write("p", 1), remove("q", 1)])
    assert await client.pttl("cache:acme:Patient:p") == -1


async def test_a_late_write_does_not_lengthen_a_tombstone(client: Redis, cache: ValkeySecondary):
    brief = ValkeySecondary("cache", client, "brief", tombstones_for=timedelta(seconds=1))
    await brief.apply([remove("p", 2)])
    assert list(await brief.apply([write("p", 1)])) == [Stale()]
    assert 0 < await client.pttl("brief:acme:Patient:p") <= 1_000


async def test_find_agrees_with_a_scan_about_what_the_index_lost(cache: ValkeySecondary, client: Redis):
    """R5: a resource that no listing shows is missing, however whole its hash is."""
    await cache.apply([write("p", 1), write("q", 2)])
    await client.zrem("cache:acme:Patient", "p")
    assert await cache.find("acme", "Patient", ["p", "q"]) == await seen(cache) == held([write("q", 2)])


async def test_content_that_is_no_json_equals_nothing_and_spoils_no_listing(cache: ValkeySecondary, client: Redis):
    """R5: another hand's damage shows where it is, by scan and by find."""
    await cache.apply(batch := [write("a", 1), write("b", 2), write("c", 3)])
    await client.hset("cache:acme:Patient:b", "content", b"{\xff")
    assert await seen(cache) == [held(batch)[0], ResourceDigest("b", 2, ""), held(batch)[2]]
    assert await cache.find("acme", "Patient", ["b"]) == [ResourceDigest("b", 2, "")]


# A word of any length, what only Python takes for a number, and what is higher than any position can be.
NO_POSITIONS = ["x", "", "no position at all", "-1", " 7", "7_0", "007", "7.5", str(2**63), "9" * 5_000]


@pytest.mark.parametrize("odd", NO_POSITIONS, ids=lambda odd: odd[:20])
@pytest.mark.parametrize("repair", [write("b", 4), remove("b", 4)], ids=["written", "deleted"])
async def test_a_position_that_is_none_spoils_no_listing_and_is_overwritten(
    cache: ValkeySecondary, client: Redis, odd: str, repair: SyncEvent
):
    """R5: it equals nothing, so reconcile repairs it, and the script does not take it for a newer state."""
    await cache.apply(batch := [write("a", 1), write("b", 2), write("c", 3)])
    await client.hset("cache:acme:Patient:b", "position", odd)
    damaged = ResourceDigest("b", 0, "")
    assert await seen(cache) == [held(batch)[0], damaged, held(batch)[2]]
    assert await cache.find("acme", "Patient", ["b"]) == [damaged]
    assert list(await cache.apply([repair])) == [Applied()]
    assert await seen(cache) == held([event for event in (batch[0], repair, batch[2]) if event.content])
    assert list(await cache.apply([repair])) == [Stale()]


async def test_a_position_that_is_none_is_found_and_repaired(
    primary: AsyncEngine, cache: ValkeySecondary, client: Redis
):
    """R5: by the events of reconcile, whatever its content; what the primary has not is removed."""
    world = await World(primary, cache).open()
    await world.write(["1", "2", "3"])
    await world.relay()
    for name in ("2", "extra"):
        await client.hset(f"cache:north:Note:{name}", mapping={"position": "no position", "content": said("first")})
        await client.zadd("cache:north:Note", {name: 0})
    await client.zadd("cache:north:Note", {b"2\xff": 0})
    found = await world.reconcile(repair=True, most_deletes=0.5)
    assert (found.altered + found.stale, found.extra, found.repaired) == (1, 1, 2)
    await world.relay()
    assert (await world.reconcile()).in_sync
    assert await client.hget("cache:north:Note:2", "position") == b"4"


@pytest.mark.parametrize("odd", NO_POSITIONS, ids=lambda odd: odd[:20])
async def test_a_highest_position_that_is_none_is_looked_for_again(cache: ValkeySecondary, client: Redis, odd: str):
    """C4: what another hand put in its place withholds nothing from a secondary for ever."""
    assert await cache.highest_position() == 0
    await client.hset("cache:%highest", "position", odd)
    assert await cache.highest_position() == 0
    await cache.apply([write("p", 3)])
    assert await cache.highest_position() == 3
    await client.hset("cache:%highest", "position", odd)
    await client.hset("cache:acme:Patient:q", "position", odd)
    assert await cache.highest_position() == 3
    assert await client.hget("cache:%highest", "position") == b"3"


async def test_a_member_that_is_no_id_is_nobody_s_and_ends_no_listing(cache: ValkeySecondary, client: Redis):
    """R5: no event could name it; a page of nothing else is not the last one."""
    await cache.apply(batch := [write("a", 1), write("\U0010ffff", 2)])
    await client.zadd("cache:acme:Patient", {b"b\xff%d" % number: 0 for number in range(450)})
    assert await seen(cache) == held(batch)
    assert await cache.find("acme", "Patient", ["a"]) == held(batch[:1])


async def test_scopes_are_those_of_the_prefix_also_where_another_hand_wrote(cache: ValkeySecondary, client: Redis):
    """R5: a wrong tenant is found; what is not of our form is nobody's scope."""
    await cache.apply([write("p", 1)])
    await ValkeySecondary("other", client, "cache-2").apply([write("p", 1, place=("other", "Patient"))])
    await client.zadd("cache:wrong%2525:Patient", {"p": 0})
    for odd in ("cache:alone", "cache:a:b:c", b"cache:\xff:b", "cache:%41:b", "cache:%zz:b"):
        await client.zadd(odd, {"p": 0})
    await client.set("cache:text:Patient", "p")
    assert set(await cache.scopes()) == {("acme", "Patient"), ("wrong%25", "Patient")}


async def test_scopes_and_the_first_highest_position_walk_past_every_key(cache: ValkeySecondary, client: Redis):
    batch = [write(f"p{number}", number, place=(f"t{number % 7}", "Patient")) for number in range(1, 5_001)]
    await cache.apply(batch)
    assert sorted(await cache.scopes()) == [(f"t{number}", "Patient") for number in range(7)]
    await client.delete("cache:%highest")
    assert await cache.highest_position() == 5_000


async def test_the_highest_position_of_what_was_written_before_it_was_kept(cache: ValkeySecondary, client: Redis):
    """C4: a lower position that is kept since does not hide a higher one; the walk is made once."""
    await cache.apply([write("p", 2**62 + 1), remove("q", 2**62 + 5)])
    await client.delete("cache:%highest")
    await cache.apply([write("r", 7)])
    await client.config_resetstat()
    assert await cache.highest_position() == 2**62 + 5
    await cache.apply([write("r", 2**62 + 9)])
    assert await cache.highest_position() == 2**62 + 9
    assert (await client.info("commandstats"))["cmdstat_scan"]["calls"] == 1


async def test_what_is_applied_during_the_walk_counts(cache: ValkeySecondary, client: Redis):
    """The walk may have passed its place already."""
    await cache.apply([write("p", 5)])
    await client.hset("cache:%highest", "position", str(2**62 + 1))
    assert await cache.highest_position() == 2**62 + 1


async def test_the_highest_position_outlives_a_tombstone(cache: ValkeySecondary, client: Redis):
    """C4: a secondary that is ahead of its primary is so after its deletes have expired too."""
    await cache.apply([write("p", 1), remove("q", 9)])
    assert await cache.highest_position() == 9
    await client.delete("cache:acme:Patient:q")
    assert await cache.highest_position() == 9


async def test_who_may_only_read_is_told_the_highest_position(remote: ValkeySecondary, server: ValkeyServer):
    await remote.apply([write("p", 3)])
    async with Redis.from_url(server.url) as client:
        await client.replicaof("127.0.0.1", "1")
        try:
            assert await remote.highest_position() == 3
            assert await remote.scopes() == [("acme", "Patient")]
        finally:
            await client.replicaof("NO", "ONE")


async def test_prefixes_are_apart(cache: ValkeySecondary, client: Redis):
    other = ValkeySecondary("other", client, "other")
    await cache.apply([write("p", 2)])
    assert list(await other.apply([write("p", 1)])) == [Applied()]
    assert await seen(cache) == held([write("p", 2)])
    assert await seen(other) == held([write("p", 1)])


@pytest.mark.parametrize("prefix", ["", "a:b", "a b", "{a}b", "a{", "é", "*", "a\n"])
def test_a_prefix_that_could_collide_is_refused(prefix: str):
    with pytest.raises(SettingsError, match="prefix"):
        ValkeySecondary("cache", "redis://127.0.0.1", prefix)


def test_tombstones_that_would_not_live_are_refused():
    with pytest.raises(SettingsError, match="tombstones_for"):
        ValkeySecondary("cache", "redis://127.0.0.1", tombstones_for=timedelta(0))


async def test_a_given_client_stays_open(cache: ValkeySecondary, client: Redis):
    await cache.aclose()
    assert await client.ping()


async def test_a_foreign_key_in_the_way_stops_its_resource_alone(cache: ValkeySecondary, client: Redis):
    """F1: it is retried, the others arrive, and a listing shows it as different from anything."""
    await cache.apply(batch := [write("o", 1), write("p", 2), write("q", 3)])
    await client.set("cache:acme:Patient:p", "mine")
    outcomes = await cache.apply([write("o", 4), write("p", 5), remove("q", 6)])
    assert [getattr(outcome, "code", "") for outcome in outcomes] == ["", "WRONGTYPE", ""]
    damaged = ResourceDigest("p", 0, "")
    assert await seen(cache) == [*held([write("o", 4)]), damaged]
    assert await cache.find("acme", "Patient", ["p"]) == [damaged]
    assert await cache.content_of("Patient", "p", tenant_id="acme") is None
    await client.delete("cache:acme:Patient:p")
    assert list(await cache.apply([batch[1]])) == [Applied()]


async def test_a_foreign_key_in_an_index_s_place_stops_its_scope_alone(cache: ValkeySecondary, client: Redis):
    """Nothing of an event is written before it is found."""
    await client.set("cache:acme:Patient", "mine")
    outcomes = await cache.apply([write("o", 1, place=("acme", "Organization")), write("p", 2), remove("q", 3)])
    assert [getattr(outcome, "code", "") for outcome in outcomes] == ["", "WRONGTYPE", "WRONGTYPE"]
    assert not await client.exists("cache:acme:Patient:p", "cache:acme:Patient:q")
    assert await cache.highest_position() == 1


async def test_a_full_server_is_unavailable_and_loses_nothing(remote: ValkeySecondary, server: ValkeyServer):
    await remote.apply([write("a", 1), write("p", 1)])
    async with Redis.from_url(server.url) as client:
        await client.config_set("maxmemory", "1")
        try:
            assert await _code(remote) == "OOM"
            assert list(await remote.apply([remove("a", 2)])) == [Applied()]
        finally:
            await client.config_set("maxmemory", "0")
    assert list(await remote.apply([write("a", 1), write("p", 1)])) == [Stale(), Stale()]
    assert await seen(remote) == held([write("p", 1)])


async def test_a_read_only_server_is_unavailable(remote: ValkeySecondary, server: ValkeyServer):
    async with Redis.from_url(server.url) as client:
        await client.replicaof("127.0.0.1", "1")
        try:
            assert await _code(remote) == "READONLY"
        finally:
            await client.replicaof("NO", "ONE")
    assert list(await remote.apply([write("p", 1)])) == [Applied()]


async def test_a_wrong_password_is_told_by_its_code(server: ValkeyServer):
    wrong = ValkeySecondary("cache", server.url.replace("//", "//nobody:secret@"))
    assert await _code(wrong) == "NOAUTH"
    await wrong.aclose()


async def test_a_frozen_server_is_unavailable_in_time(remote: ValkeySecondary, server: ValkeyServer):
    await remote.apply([write("p", 1)])
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(5):
            assert await _code(remote) == "timeout"
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert list(await remote.apply([write("p", 100)])) == [Applied()]


async def test_a_server_that_was_down_is_used_again(remote: ValkeySecondary, server: ValkeyServer):
    await remote.apply([write("p", 2)])
    await asyncio.to_thread(server.kill)
    try:
        async with asyncio.timeout(5):
            assert await _code(remote) in {"refused", "disconnected"}
            assert await _code(remote) == "refused"
            with pytest.raises(Unavailable):
                await remote.check()
            with pytest.raises(Unavailable):
                await seen(remote)
    finally:
        await asyncio.to_thread(server.start)
    await remote.check()
    assert list(await remote.apply([write("p", 1)])) == [Stale()]
    assert await seen(remote) == held([write("p", 2)])
