"""Interrupt: let one signal end a coroutine in order, by cancelling it once and never again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

__all__ = ["until_signal"]


def until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Run `work` in a loop of its own and return its exit status.

    SIGINT or SIGTERM cancels it; when it has cleaned up, the status is 128 plus the signal's number, as shells have it.
    Further signals change nothing: they would interrupt the cleaning up.
    """
    return asyncio.run(_until_signal(work))


async def _until_signal(work: Coroutine[Any, Any, int]) -> int:
    working = asyncio.ensure_future(work)
    came: list[int] = []

    def interrupt(number: int) -> None:
        came.append(number)
        if len(came) == 1:
            working.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt, number)
    try:
        return await working
    except asyncio.CancelledError:
        if not came:
            raise
        return 128 + came[0]
