"""Promise 13 and R6: what counts as the same content, and what does not."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import InvalidEvent, SyncEvent
from outbox.content import canonical, content_digest

SAME = [
    ('{"a": 1, "b": [2]}', '{ "b" : [ 2 ],\n"a":1 }'),
    ('{"a": 1}', '{"a": 1.0}'),
    ('{"a": 1.50}', '{"a": 1.5}'),
    ('{"a": 150}', '{"a": 1.5e2}'),
    ('{"a": 0}', '{"a": -0.0}'),
    ('{"a": 0}', '{"a": 0e999999}'),
    ('{"a": 1e308}', '{"a": 1' + "0" * 308 + "}"),
    ('{"a": 9007199254740993}', '{"a": 9007199254740993.000}'),
    ('{"a": "\\u00e9\\/"}', '{"a": "é/"}'),
    ('{"a": 1e1000000}', '{"a": 10e999999}'),
]
DIFFERENT = [
    ('{"a": true}', '{"a": 1}'),
    ('{"a": false}', '{"a": 0}'),
    ('{"a": null}', "{}"),
    ('{"a": null}', '{"a": 0}'),
    ('{"a": "1"}', '{"a": 1}'),
    ('{"a": "null"}', '{"a": null}'),
    ('{"a": []}', '{"a": {}}'),
    ('{"a": [1, 2]}', '{"a": [2, 1]}'),
    ('{"a": [[1], 2]}', '{"a": [1, [2]]}'),
    ('{"a": 9007199254740993}', '{"a": 9007199254740992}'),
    ('{"a": 0.1}', '{"a": 0.1000000000000000055511151231257827}'),
    ('{"a": 1e308}', '{"a": 1e309}'),
    ('{"a": 1}', '{"a": -1}'),
    ('{"a": 1}', '{"a": 10}'),
    ('{"a": "\\u00e9"}', '{"a": "e\\u0301"}'),
    ('{"a": "A"}', '{"a": "a"}'),
    ('{"a": "a "}', '{"a": "a"}'),
    ('{"a ": 1}', '{"a": 1}'),
    ('{"a": ""}', '{"a": null}'),
    ('{"a": {"b": 1}}', '{"a": {}, "b": 1}'),
    ('{"a,b": 1}', '{"a": 1, "b": 1}'),
    ('{"a": "\\",\\"b\\":\\""}', '{"a": "", "b": ""}'),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spelling_does_not_count(one: str, other: str) -> None:
    assert SyncEvent.create("Note", "1", one).content == one
    assert canonical(one) == canonical(other)
    assert content_digest(one) == content_digest(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_everything_else_does(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)
    assert content_digest(one) != content_digest(other)


@pytest.mark.parametrize("number", ["1e99999999999999999999", "-1e-99999999999999999999", "0e" + "9" * 400])
def test_what_is_stored_has_a_form(number: str) -> None:
    """No event may be accepted and then stop every reconcile that meets it."""
    with suppress(InvalidEvent):
        content = SyncEvent.create("Note", "1", f'{{"a": {number}}}').content
        assert content_digest(content or "") != content_digest('{"a": 1}')


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
)
keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
objects = st.dictionaries(
    keys, st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=8)
)


@given(objects, st.randoms(use_true_random=False))
def test_the_form_is_the_same_for_every_spelling_of_a_value(value: dict[str, Any], chance: random.Random) -> None:
    spelt = json.dumps(_shuffled(value, chance), indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5)
    form = canonical(json.dumps(value))
    assert canonical(spelt) == form
    # It is JSON of the same value itself, and its own canonical form.
    assert _exact(json.loads(form, parse_float=Decimal, parse_int=Decimal)) == _exact(_decimals(value))
    assert canonical(form) == form


@given(objects, objects)
def test_two_values_share_a_form_only_if_they_are_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    equal = _exact(_decimals(one)) == _exact(_decimals(other))
    assert (canonical(json.dumps(one)) == canonical(json.dumps(other))) == equal


def _shuffled(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict):
        pairs = [(key, _shuffled(item, chance)) for key, item in value.items()]
        chance.shuffle(pairs)
        return dict(pairs)
    return [_shuffled(item, chance) for item in value] if isinstance(value, list) else value


def _decimals(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_float=Decimal, parse_int=Decimal)


def _exact(value: Any) -> Any:
    """Return a value whose `==` tells True from 1 and null from absent, and takes numbers by their value."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return (type(value).__name__, value)
