"""The command line's door: `outbox`. What it can be told is in `commands`."""

from __future__ import annotations

import os
import sys
import traceback
from importlib.util import find_spec

from outbox.errors import OutboxError

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    The exit status is 0 when all is well, 1 when a command found something wrong, 2 when it could not tell or was
    told something it does not know. `OUTBOX_DEBUG=1` shows where an error was raised.
    """
    if any(find_spec(name) is None for name in ("typer", "rich")):
        _fail("the command line is an extra: pip install 'outbox-sync[cli]'")
    from outbox.commands import app  # noqa: PLC0415 - it needs the extra

    try:
        app()
    except Exception as error:  # noqa: BLE001 - whatever it is: 1 would say that something was looked at and is wrong
        if isinstance(error, OutboxError) and os.environ.get("OUTBOX_DEBUG") != "1":
            _fail(str(error))
        traceback.print_exc()
        raise SystemExit(2) from None


def _fail(sentence: str) -> None:
    sys.stderr.write(f"outbox: {sentence}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
