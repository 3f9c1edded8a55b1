"""The in-memory secondary keeps the contract."""

from __future__ import annotations

import pytest

from outbox.secondaries.memory import MemorySecondary
from outbox.testing.contract import SecondaryContract


class TestMemory(SecondaryContract):
    @pytest.fixture
    def secondary(self) -> MemorySecondary:
        return MemorySecondary()
