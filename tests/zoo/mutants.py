"""The zoo's inmates: each a defect that was put in on purpose, and the tests that must see it."""

from __future__ import annotations

import os
import random
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_HERE = Path(__file__).parent
_BY_DEFAULT = 12


@dataclass(frozen=True)
class Change:
    """One text of one file, and what stands in its place; the text must be there, and once."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A defect. `raises` names errors other than a failed assertion that show it."""

    name: str
    guarantee: int
    changes: tuple[Change, ...]
    caught_by: tuple[str, ...]
    raises: tuple[str, ...] = ()

    def apply(self, root: Path) -> None:
        """Change the copy of the project at `root`. Raises `AssertionError` when the project has moved on."""
        for change in self.changes:
            path = root / change.file
            text = path.read_text() if path.exists() else ""
            found = text.count(change.old)
            assert found == 1, (
                f"this mutant does not apply any more: {change.file} has its text {found} times, not once;"
                f" put the defect in where the code is now:\n{change.old}"
            )
            path.write_text(text.replace(change.old, change.new))


@dataclass(frozen=True)
class Choice:
    """Which of them are let out, and what brings the same ones again."""

    mutants: list[Mutant]
    of: int
    seed: str

    def __str__(self) -> str:
        if len(self.mutants) == self.of:
            return f"zoo: all {self.of} mutants"
        names = ", ".join(mutant.name for mutant in self.mutants)
        return f"zoo: {len(self.mutants)} of {self.of} mutants (OUTBOX_TEST_ZOO={self.seed}; `all` for all): {names}"


def everyone() -> list[Mutant]:
    """Return every mutant, in the order of the files and of their lines."""
    found = []
    for path in sorted(_HERE.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            changes = tuple(Change(**each) for each in entry.pop("change"))
            caught_by = tuple(f"tests/{test}" for test in entry.pop("caught_by"))
            raises = tuple(entry.pop("raises", ()))
            found.append(Mutant(changes=changes, caught_by=caught_by, raises=raises, **entry))
    return found


def chosen() -> Choice:
    """Return those that OUTBOX_TEST_ZOO asks for: `all`, `none`, words of a name, or a seed; by default today's."""
    mutants = everyone()
    asked = os.environ.get("OUTBOX_TEST_ZOO") or str(datetime.now(UTC).date().toordinal())
    if asked == "all":
        return Choice(mutants, len(mutants), asked)
    if asked == "none":
        return Choice([], len(mutants), asked)
    if not asked.isdecimal():
        return Choice([each for each in mutants if asked in each.name], len(mutants), asked)
    some = random.Random(int(asked)).sample(mutants, min(_BY_DEFAULT, len(mutants)))
    return Choice(some, len(mutants), asked)
