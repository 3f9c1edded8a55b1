#!/usr/bin/env python3
"""Select the resources shipped beside this script from the npm package hl7.fhir.r4.examples 4.0.1.

    npm pack hl7.fhir.r4.examples@4.0.1
    python3 select_subset.py hl7.fhir.r4.examples-4.0.1.tgz

Writes one NDJSON file per resource type beside this script and prints the table of the README.
Needs Python 3.11 and nothing else.
"""

import hashlib
import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHA256 = "dce87f1b5b9341867033f7d1f544fa1b5232503f6d62813887ac6b8a8b6cb682"
RESOURCE_BYTES = 65_536
NARRATIVE_BYTES = 8_192
# They name patients without being about one: containers, conformance tests, knowledge.
NOT_PATIENT_CARE = {"ActivityDefinition", "Bundle", "TestReport", "TestScript"}

_STRING_OR_SPACE = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')

Key = tuple[str, str]


class Resource(NamedTuple):
    """One resource: its compact text and the keys it refers to."""

    text: str
    refers_to: set[Key]


def main(package: Path, folder: Path) -> None:
    """Write the subset of the package's archive into the folder."""
    if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{package} is not hl7.fhir.r4.examples 4.0.1: its SHA-256 differs")
    resources = dict(small_resources(package))
    types = {resource_type for resource_type, _ in tied_to_patients(resources)}
    by_type = defaultdict(list)
    for resource_type, resource_id in sorted(resources):
        if resource_type in types:
            by_type[resource_type].append(resources[resource_type, resource_id].text)
    for resource_type, texts in by_type.items():
        lines = "".join(f"{text}\n" for text in texts)
        (folder / f"{resource_type}.ndjson").write_bytes(lines.encode())
    sys.stdout.write(table(by_type))


def small_resources(package: Path) -> Iterator[tuple[Key, Resource]]:
    """Yield the package's resources of patient care that are small enough to ship."""
    with tarfile.open(package) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None or member.size > 4 * RESOURCE_BYTES:
                continue
            text = compact(file.read().decode())
            value = json.loads(text)
            resource_type = value.get("resourceType")
            if resource_type and resource_type not in NOT_PATIENT_CARE and is_small(text, value):
                yield (resource_type, value["id"]), Resource(text, set(references(value)))


def compact(text: str) -> str:
    """Drop the white space between JSON tokens; every token stays to the letter, 1.50 too."""
    return _STRING_OR_SPACE.sub(lambda match: match[1] or "", text)


def is_small(text: str, value: Any) -> bool:
    """Tell whether the resource is small, and not mostly a page of prose."""
    narrative = value.get("text", {}).get("div", "")
    return len(text.encode()) <= RESOURCE_BYTES and len(narrative.encode()) <= NARRATIVE_BYTES


def references(value: Any) -> Iterator[Key]:
    """Yield (type, id) of every literal reference inside a resource, without version and host."""
    if isinstance(value, dict):
        steps = str(value.get("reference", "")).split("/_history/")[0].split("/")
        if len(steps) >= 2:
            yield steps[-2], steps[-1]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def tied_to_patients(resources: dict[Key, Resource]) -> set[Key]:
    """Return every resource that a chain of references, in either direction, ties to a Patient."""
    neighbours = defaultdict(set)
    for key, resource in resources.items():
        for other in resource.refers_to & resources.keys():
            neighbours[key].add(other)
            neighbours[other].add(key)
    tied = {key for key in resources if key[0] == "Patient"}
    frontier = tied
    while frontier:
        frontier = {other for key in frontier for other in neighbours[key]} - tied
        tied = tied | frontier
    return tied


def table(by_type: dict[str, list[str]]) -> str:
    """Return the Markdown table of the README: resources and bytes per type."""
    rows = [(name, len(texts), sum(len(t.encode()) + 1 for t in texts)) for name, texts in by_type.items()]
    rows.append(("**all**", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"| {name} | {count:,} | {size:,} |\n" for name, count, size in rows]
    return "".join(["| resource type | resources | bytes |\n", "| --- | --: | --: |\n", *lines])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: select_subset.py hl7.fhir.r4.examples-4.0.1.tgz")
    main(Path(sys.argv[1]), Path(__file__).parent)
