"""The shipped FHIR resources are what their README says, and are loaded to the letter."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import tracemalloc
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from outbox import event
from outbox.testing import fhir

SHIPPED = Path(__file__).parent.parent / "examples" / "fhir"
_README_ROW = re.compile(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)
_README_TOTAL = re.compile(r"^\| \*\*all\*\* \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)

PATIENT = '{ "resourceType" : "Patient",\n  "id" : "p1", "multipleBirthInteger" : 2 }\n'
DOSE = '{"resourceType":"Observation","id":"o1","valueQuantity":{"value":1.50,"n":1e0}}'


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def test_counts_are_those_of_the_readme():
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    claimed = {name: (_number(n), _number(size)) for name, n, size in _README_ROW.findall(readme)}
    loaded = Counter(resource.resource_type for resource in fhir.load())
    held = {name: (count, (SHIPPED / f"{name}.ndjson").stat().st_size) for name, count in loaded.items()}
    assert held == claimed
    [total] = _README_TOTAL.findall(readme)
    sums = tuple(sum(column) for column in zip(*claimed.values(), strict=True))
    assert sums == tuple(map(_number, total))
    assert f"{sums[0]} resources of {len(claimed)} types" in readme


def test_the_subset_stays_small():
    assert 500 <= sum(1 for _ in fhir.load()) <= 700
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 3_000_000
    assert max(len(resource.text.encode()) for resource in fhir.load()) <= 65_536


def test_every_resource_makes_an_event_and_keeps_its_text():
    reader = fhir.load()
    for resource in reader:
        created = event.SyncEvent.create(
            resource.resource_type, resource.resource_id, resource.text, fhir_version="4.0"
        )
        assert created.content == resource.text
    assert reader.skipped == 0


def test_each_file_holds_its_type_sorted_by_id_once():
    for path in SHIPPED.glob("*.ndjson"):
        resources = list(fhir.load(path))
        ids = [resource.resource_id for resource in resources]
        assert ids == sorted(set(ids)), path.name
        assert {resource.resource_type for resource in resources} == {path.stem}


def test_decimals_are_as_the_source_wrote_them():
    texts = {(r.resource_type, r.resource_id): r.text for r in fhir.load()}
    claim = json.loads(texts["Claim", "860150"], parse_float=Decimal)
    assert str(claim["item"][0]["net"]["value"]) == "75.00"
    trailing_zeros = re.findall(r'"value":-?\d+\.\d*0[,}]', "".join(texts.values()))
    assert len(trailing_zeros) > 100


def test_the_shipped_subset_is_found_without_being_named():
    assert list(fhir.load()) == list(fhir.load(SHIPPED))


@pytest.mark.parametrize("named", [".", "package"])
def test_an_unpacked_npm_package(tmp_path: Path, named: str):
    package = tmp_path / "package"
    package.mkdir()
    (package / "package.json").write_text('{"name": "hl7.fhir.r4.examples"}', encoding="utf-8")
    (package / "Patient-p1.json").write_text(PATIENT, encoding="utf-8")
    (package / "Observation-o1.json").write_text(DOSE, encoding="utf-8")
    (package / "README.md").write_text("not data, and not counted", encoding="utf-8")
    reader = fhir.load(tmp_path / named)
    assert list(reader) == [
        fhir.FhirResource("Observation", "o1", DOSE),
        fhir.FhirResource("Patient", "p1", PATIENT),
    ]
    assert reader.skipped == 1


@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_ndjson_keeps_good_lines_and_counts_bad_ones(tmp_path: Path, name: str):
    bad = [
        b'{"resourceType":"Patient"}',
        b'{"id":"x"}',
        b'{"resourceType":"Patient","id":7}',
        b'{"resourceType":"Patient","id":""}',
        b'["Patient"]',
        b'{"resourceType":"Patient","id":"cut',
        b'{"resourceType":"Patient","id":"\xff"}',
    ]
    body = b"\n".join([DOSE.encode(), b"", *bad, b'{"id":"p2","resourceType":"Patient"}\r\n'])
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb") as file:
        file.write(body)
    for source in (tmp_path, tmp_path / name):
        reader = fhir.load(source)
        assert list(reader) == [
            fhir.FhirResource("Observation", "o1", DOSE),
            fhir.FhirResource("Patient", "p2", '{"id":"p2","resourceType":"Patient"}'),
        ]
        assert reader.skipped == len(bad)


def test_nothing_to_load_is_said_at_once(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        fhir.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        fhir.load(tmp_path / "absent")


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    line = '{"resourceType":"Patient","id":"%d","text":"' + "x" * 10_000 + '"}\n'
    export = tmp_path / "export.ndjson"
    with export.open("w", encoding="utf-8") as file:
        file.writelines(line % number for number in range(2_000))
    tracemalloc.start()
    try:
        count = sum(1 for _ in fhir.load(export))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2_000
    assert peak < export.stat().st_size / 20


def test_a_reader_left_half_way_leaves_no_file_open():
    # An open file would be a ResourceWarning, which the test settings turn into an error.
    assert len(list(itertools.islice(fhir.load(), 3))) == 3
