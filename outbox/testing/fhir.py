"""Real FHIR resources for tests and demos: the shipped subset, or any package or NDJSON export."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

__all__ = ["FhirReader", "FhirResource", "load"]

_SUFFIXES = (".json", ".json.gz", ".ndjson", ".ndjson.gz")


class FhirResource(msgspec.Struct, frozen=True):
    """One resource as a file holds it: `text` is its JSON to the letter."""

    resource_type: str
    resource_id: str
    text: str


class FhirReader(Iterator[FhirResource]):
    """Reads resources one by one in file name and line order, holding one at a time in memory.

    `skipped` counts what was passed over so far because it is no resource with a type and an id: a
    `package.json`, a broken line, a resource without id. Blank lines are not counted.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.skipped = 0
        self._found = _read(paths)

    def __next__(self) -> FhirResource:
        for found in self._found:
            if found is not None:
                return found
            self.skipped += 1
        raise StopIteration


def load(source: Path | None = None) -> FhirReader:
    """Return a reader of every resource under `source`; None stands for the shipped subset.

    `source` is an unpacked npm package (the folder `package` or the one above it), a folder of
    `.json` or `.ndjson` files, or one such file; each may be compressed as `.gz`. Texts come
    exactly as stored. Raises `FileNotFoundError` at once when nothing of the kind is there.
    """
    return FhirReader(_paths(_shipped() if source is None else source))


class _Head(msgspec.Struct):
    """The two fields that make JSON text a resource; the rest is skipped, not built."""

    resource_type: str = msgspec.field(name="resourceType")
    resource_id: str = msgspec.field(name="id")


_HEAD = msgspec.json.Decoder(_Head)


def _shipped() -> Path:
    package = Path(str(files("outbox")))
    installed = package / "examples" / "fhir"
    # In a source tree the examples lie beside the package; a wheel carries them inside.
    return installed if installed.is_dir() else package.parent / "examples" / "fhir"


def _paths(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    folder = source / "package" if (source / "package").is_dir() else source
    paths = sorted(path for path in folder.glob("*") if path.name.endswith(_SUFFIXES))
    if not paths:
        raise FileNotFoundError(f"no .json or .ndjson file in {folder}")
    return paths


def _read(paths: Sequence[Path]) -> Iterator[FhirResource | None]:
    for path in paths:
        for raw in _records(path):
            yield _parsed(raw)


def _records(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if path.name.endswith((".ndjson", ".ndjson.gz")):
            yield from (line.rstrip(b"\r\n") for line in file if line.strip())
        else:
            yield file.read()


def _parsed(raw: bytes) -> FhirResource | None:
    try:
        head = _HEAD.decode(raw)
        text = raw.decode()
    except (UnicodeDecodeError, msgspec.DecodeError):
        return None
    if not head.resource_type or not head.resource_id:
        return None
    return FhirResource(head.resource_type, head.resource_id, text)
