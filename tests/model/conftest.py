"""Short pages, so that in log order lines of several are common."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.resume.PAGE", 2)
