"""Waiting in tests: for a condition and with a deadline, never for a fixed time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

_PAUSE = 0.01


async def eventually(condition: Callable[[], Any | Awaitable[Any]], within: timedelta = timedelta(seconds=20)) -> Any:
    """Return the first truthy answer of `condition`, a function or a coroutine function; fail after `within`.

    An `AssertionError` of the condition counts as "not yet"; the last one is raised at the deadline.
    """
    deadline = time.monotonic() + within.total_seconds()
    while True:
        late = time.monotonic() >= deadline
        try:
            answer = condition()
            if inspect.isawaitable(answer):
                answer = await answer
        except AssertionError:
            if late:
                raise
        else:
            if answer:
                return answer
            assert not late, f"still {answer!r} after {within.total_seconds():g} s"
        await asyncio.sleep(_PAUSE)
