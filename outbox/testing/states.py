"""The states that the conformance suite writes, and what a scan must show of them."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from outbox.content import content_digest
from outbox.event import SyncEvent
from outbox.secondaries.base import Refreshable, ResourceDigest, Secondary

__all__ = ["CONTENTS", "IDS", "PLACE", "Place", "at", "held", "remove", "seen", "visible", "write"]

#: Names and JSON texts that a secondary must hold to the letter, or be known to refuse.
CONTENTS: dict[str, str] = {
    "decimals": '{"price":1.50,"tenth":0.10,"great":1e308,"small":5e-324,"zero":-0.0}',
    "great integers": f'{{"exact":{2**53 + 1},"wide":{10**29 + 7},"negative":-{10**29 + 7}}}',
    "beyond a double": '{"number":1e400}',
    "key order": '{"b":1,"a":2,"C":{"z":1,"y":2},"aa":3}',
    "escapes": '{\n\t"name" : "\\" \\\\ \\/ \\b\\f\\n\\r\\t \\u00e9 \\ud83d\\ude00 % %s :a ?" \r\n}',
    "unicode": '{"né":"e\u0301 é Ω 漢字 😀 \u202eabc\u2028 \ufeff\uffff \U0010ffff"}',
    "odd keys": '{"__proto__":{"x":1},"constructor":1,"_id":"x","$where":"1","@type":"y"}',
    "dotted keys": '{"a.b":1,"a":{"b":2},".":3,"..":4,"c.":5}',
    "empty key": '{"":1," ":2}',
    "empty values": '{"object":{},"list":[],"nested":{"a":{"b":{}},"c":[[],{}]},"text":"","no":null}',
    "mixed list": '{"list":[1,"1",1.5,null,true,{"a":1},[2]]}',
    "another shape": '{"name":{"given":["Ada"]},"n":{"value":"many"}}',
    "deep": '{"a":' * 60 + "1" + "}" * 60,
    "many keys": "{" + ",".join(f'"key{n}":{n}' for n in range(2_000)) + "}",
    "long text": '{"text":"' + "long é " * 30_000 + '"}',
}

#: Ids whose order, equality or escaping has gone wrong somewhere.
IDS: tuple[str, ...] = (
    *("a", "A", "b", "B", "aa", "a ", " a", "ab", "a-b", "a_b", "z", "Z", "_", "-", ".", ".."),
    *("1", "2", "10", "9", "007", "1e3", "true", "null", "None", "*", "%", "[a]", "{a}", "a*"),
    *("é", "e\u0301", "É", "ß", "ss", "ẞ", "ñ", "\u0131", "I", "ﬁ", "fi", "Å", "\u212b", "A\u030a"),
    *("a/b", "a?b", "a#b", "%00", "a%2Fb", "a:b", "a::b", "a%3Ab", "../a", "a\\b", "a&b=c", "a,b"),
    *("'", '"', "`", "';--", "$1", "\\", "\\0", "\u00a0", "\u200b", "\u2028", "\ufffd", "\uffff"),
    *("漢字", "\ue000", "😀", "😀a", "\U0010ffff", "x" * 512, "é" * 256, "😀" * 128),
)

#: A (tenant, type), and the one that most tests write to.
Place = tuple[str, str]
PLACE: Place = ("acme", "Patient")


def at(position: int, event: SyncEvent) -> SyncEvent:
    """Return the event as if the primary had recorded it at `position`."""
    return replace(event, position=position)


def write(name: str, position: int, content: str = "", place: Place = PLACE) -> SyncEvent:
    """Return an update at `position` in a (tenant, type); by default its content says which."""
    text = content or f'{{"name":"{place[1]}","n":{position}}}'
    return at(position, SyncEvent.update(place[1], name, text, tenant_id=place[0], version="7"))


def remove(name: str, position: int, place: Place = PLACE) -> SyncEvent:
    """Return a delete at `position` in a (tenant, type)."""
    return at(position, SyncEvent.delete(place[1], name, tenant_id=place[0]))


async def visible(secondary: Secondary) -> None:
    """Return once everything applied can be seen."""
    if isinstance(secondary, Refreshable):
        await secondary.refresh()


async def seen(secondary: Secondary, place: Place = PLACE, after: str | None = None) -> list[ResourceDigest]:
    """Return what a scan of a (tenant, type) yields, once everything applied is visible."""
    await visible(secondary)
    return [digest async for digest in secondary.scan(*place, after)]


def held(events: Iterable[SyncEvent]) -> list[ResourceDigest]:
    """Return what a scan must yield when the states of exactly these events are held."""
    alive = [
        ResourceDigest(event.resource_id, event.position or 0, content_digest(event.content))
        for event in events
        if event.content is not None
    ]
    return sorted(alive, key=lambda digest: digest.resource_id.encode())
