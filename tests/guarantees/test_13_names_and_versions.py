"""Promise 13: keys, versions and headers are kept to the letter, or refused by their name."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import FhirVersion, InvalidEvent, MemorySecondary, SyncConfig, SyncEvent, SyncManager

# Every pair of these is two resources, on both sides.
NAMES = [
    "a",
    "A",
    "a ",
    " a",
    "\u00e9",
    "e\u0301",
    "\u212b",
    "\u00c5",
    "a:b",
    "a/b",
    "a?b",
    "a#b",
    "%00",
    "..",
    ".",
    "a%2Fb",
]
NAMES += [
    "\u202ea",
    "a\u200b",
    "\U0001f9d1",
    "'; drop table outbox; --",
    'a"b',
    "a\\b",
    "{a}",
    "null",
    "0",
    "00",
    "x" * 512,
]
NAMES += ["\u4e00" * 170, "ss", "\u00df", "i", "\u0131"]


BAD_NAMES = ["", "\n", "a\nb", "a\0", "\x7f", "a\x85b", "\ud800", 7391, None, b"a", True]
BAD_FIELDS: list[tuple[str, Any]] = [
    *(("resource_id", name) for name in [*BAD_NAMES, "x" * 513, "\u4e00" * 171]),
    *(("resource_type", name) for name in [*BAD_NAMES, "x" * 129]),
    *(("tenant_id", name) for name in [*BAD_NAMES, "x" * 65, "a//b", "/a", "a/", "a b", "\u00e4", "a ", "%00", "a:b"]),
    *(("version", version) for version in [1.5, True, False, -1, 2**63, "", "\n", "v" * 129, b"1", Decimal(1)]),
    *(("fhir_version", version) for version in [4.0, True, "", "\n", "x" * 17]),
    *(
        ("headers", headers)
        for headers in [{"a": 1}, {1: "a"}, {"a": "b\n"}, {"": "a"}, {"a": "x" * 1_025}, [("a", "b")]]
    ),
    ("headers", {f"h{number}": "x" * 1_000 for number in range(2_000)}),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_its_name(field: str, value: Any) -> None:
    """P3, O7 among others: nothing is cut, folded or turned into text in silence."""
    fields = {"resource_type": "Note", "resource_id": "1", "content": {}} | {field: value}
    with pytest.raises(InvalidEvent) as refusal:
        SyncEvent.update(**fields)
    assert refusal.value.path == field
    assert "7391" not in f"{refusal.value} {refusal.value!r}"


async def test_names_that_look_alike_stay_apart_everywhere(primary: AsyncEngine) -> None:
    """O7: as resource ids in one transaction, and then each second one deleted."""
    memory = MemorySecondary()
    manager = SyncManager(primary, [memory], config=SyncConfig(doorbell=False))
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Note", name, {"name": name}) for name in NAMES)
    await manager.relay().drain()
    assert {key[2]: event.decoded() for key, event in memory.held.items()} == {name: {"name": name} for name in NAMES}
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.delete("Note", name) for name in NAMES[::2])
    await manager.relay().drain()
    assert [name for name in NAMES if memory.content_of("Note", name) is None] == NAMES[::2]
    async with primary.connect() as connection:
        found = await connection.execute(text("select resource_id from outbox where operation = 'create'"))
        assert sorted(found.scalars()) == sorted(NAMES)


async def test_versions_and_headers_arrive_as_they_were_given(primary: AsyncEngine) -> None:
    """P3."""
    memory = MemorySecondary()
    manager = SyncManager(primary, [memory], config=SyncConfig(doorbell=False))
    await manager.register()
    versions = [None, 0, 2**63 - 1, 'W/"1"', "00", "v" * 128]
    headers = {"actor": "Zo\u00eb", "a.b": "{}", "x" * 128: "y" * 1_024}
    async with manager.session() as session, session.begin():
        for number, version in enumerate(versions):
            fields = {"version": version, "headers": headers, "fhir_version": FhirVersion.R4, "tenant_id": "a/b.c_d-E"}
            session.record(SyncEvent.create("Note", f"{number}", {}, **fields))
    await manager.relay().drain()
    held = [memory.held["a/b.c_d-E", "Note", f"{number}"] for number in range(len(versions))]
    assert [each.version for each in held] == [None if version is None else str(version) for version in versions]
    assert {each.fhir_version for each in held} == {"4.0"}
    assert [json.loads(each.headers or "") for each in held] == [headers] * len(versions)
