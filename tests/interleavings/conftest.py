"""One stage per variant of a family: its connections serve every order."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.interleavings.stage import Stage, opened


@pytest.fixture
async def stage(primary: AsyncEngine) -> AsyncIterator[Stage]:
    async with opened(primary) as stage:
        yield stage
