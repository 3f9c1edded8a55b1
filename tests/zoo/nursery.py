"""A process that has loaded what tests load of others, and is forked for each run of them: half of a short run's time.

    python tests/zoo/nursery.py

It is asked on stdin and answers on stdout, a line of JSON each. Nothing of this project is loaded in it, so that each
run finds the copy that it is told of.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import Any, Never

import pytest

_LOADED = (
    "alembic.command",
    "asyncpg",
    "hypothesis.stateful",
    "msgspec",
    "psycopg",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.orm",
    "tenacity",
)
_BETWEEN_LOOKS = 0.02


def main() -> None:
    # Where this file is, as a place to import from: other files there must not shadow anything.
    del sys.path[0]
    for name in _LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if (child := os.fork()) == 0:
            _run(**asked["run"])
        sys.stdout.write(json.dumps(_ended(child, asked["seconds"])) + "\n")
        sys.stdout.flush()


def _run(root: str, options: list[str], surroundings: dict[str, str], printed: str) -> Never:
    """Become a run of tests in a directory."""
    # A test's own processes must not outlive it when it is cut off.
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(root)
    os.environ.clear()
    os.environ.update(surroundings)
    sys.path.insert(0, root)
    raise SystemExit(pytest.main(options))


def _ended(child: int, seconds: float) -> dict[str, Any]:
    """Wait for a run, or cut it off."""
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"cut_off": True}
        time.sleep(_BETWEEN_LOOKS)
    return {"cut_off": False}


if __name__ == "__main__":
    main()
