"""Which adapter can do what beyond `apply` and `scan`: a capability that got lost would only be skipped elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from outbox.secondaries.base import Checkable, Closeable, Findable, Listable, Positioned, Refreshable, Summable
from outbox.secondaries.memory import MemorySecondary
from outbox.secondaries.opensearch import ElasticsearchSecondary, OpenSearchSecondary
from outbox.secondaries.sql import SqlSecondary
from outbox.secondaries.storage import ResourceStorageSecondary
from outbox.secondaries.valkey import ValkeySecondary
from tests.scripted import ScriptedSecondary

ALL = (Checkable, Closeable, Findable, Listable, Positioned, Refreshable, Summable)
SEARCH = {Checkable, Closeable, Findable, Listable, Positioned, Refreshable}


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (MemorySecondary, {Findable, Listable, Positioned, Summable}),
        (ScriptedSecondary, {Findable, Listable, Positioned, Summable}),
        (SqlSecondary, {Checkable, Closeable, Findable, Listable, Positioned, Summable}),
        (OpenSearchSecondary, SEARCH),
        (ElasticsearchSecondary, SEARCH),
        (ValkeySecondary, {Checkable, Closeable, Findable, Listable, Positioned}),
        (ResourceStorageSecondary, {Checkable, Findable}),
    ],
)
def test_every_adapter_can_do_what_is_said_of_it(adapter: type, expected: set[Any]):
    assert {capability for capability in ALL if issubclass(adapter, capability)} == expected
