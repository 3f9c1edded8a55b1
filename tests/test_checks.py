"""Types, lint, format and layers, checked by the tools of the interpreter that runs the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# import-linter has no `python -m` form.
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as main; main()"


@pytest.mark.timeout(600)  # mypy without a cache reads all of SQLAlchemy's types first
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-m", "mypy", "--strict"], id="mypy"),
        pytest.param(["-m", "ruff", "check", "."], id="ruff-check"),
        pytest.param(["-m", "ruff", "format", "--check", "."], id="ruff-format"),
        pytest.param(["-c", LINT_IMPORTS, "--no-logo", "--no-cache"], id="import-linter"),
    ],
)
def test_check(arguments: list[str]):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)
