"""Plain: tell quickly that nothing is wrong with a content, as is so of nearly all, and every writer waits for it.

What is not plain is walked value by value, so that a refusal can name the path. Escapes, exponents and values of other
types are not looked at here: False says nothing.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NoReturn

__all__ = ["ENCODER", "is_plain_text", "text_of_plain"]

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

_BYTES_OF_A_CHARACTER = 4
_WITHIN = (str, int, float, bool, type(None))


class _NotPlain(Exception):
    """Something is wrong, or cannot be ruled out so quickly."""


def is_plain_text(text: str, depth: int, key_bytes: int) -> bool:
    """Whether a text surely is a JSON object with no key twice or too long, nothing too deep, and only Unicode text."""
    if not _holds_plain_characters(text):
        return False
    try:
        # An object became its depth, a number nought; a list and a word are of other types.
        found = _decoder(depth, key_bytes // _BYTES_OF_A_CHARACTER).decode(text)
    except (_NotPlain, ValueError, RecursionError):
        return False
    return type(found) is int and found > 0


def text_of_plain(content: Any, depth: int, key_bytes: int) -> str | None:
    """Return the JSON text of a dict that holds nothing but plain values; None for whatever must be walked."""
    try:
        if type(content) is not dict or _depth_of(content, key_bytes // _BYTES_OF_A_CHARACTER) > depth:
            return None
        text = ENCODER.encode(content)
    except (_NotPlain, ValueError, RecursionError):
        return None
    return text if _holds_plain_characters(text) else None


def _holds_plain_characters(text: str) -> bool:
    # JSON has no control characters as they are, and without escapes it has no others than these.
    if "\\u" in text:
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


@lru_cache(maxsize=8)
def _decoder(depth: int, longest: int) -> json.JSONDecoder:
    def depth_of_object(pairs: list[tuple[str, Any]]) -> int:
        inside = 0
        for key, value in pairs:
            # Without a call for what most values are, which is text.
            kind = type(value)
            if kind is int and value > inside:
                inside = value
            elif kind is list:
                inside = max(inside, _depth_of_list(value))
            if len(key) > longest:
                raise _NotPlain
        if inside >= depth or len(dict(pairs)) < len(pairs):
            raise _NotPlain
        return inside + 1

    return json.JSONDecoder(
        object_pairs_hook=depth_of_object, parse_int=_nought, parse_float=_nought, parse_constant=_refuse
    )


def _depth_of_list(values: list[Any]) -> int:
    inside = 0
    for value in values:
        kind = type(value)
        if kind is int and value > inside:
            inside = value
        elif kind is list:
            inside = max(inside, _depth_of_list(value))
    return inside + 1


def _depth_of(value: Any, longest: int) -> int:
    """Return how deep a dict or list is, in which every key is short text."""
    inside = 0
    if type(value) is dict:
        for key in value:
            if type(key) is not str or len(key) > longest:
                raise _NotPlain
        value = value.values()
    elif type(value) is not list:
        raise _NotPlain
    for each in value:
        if type(each) not in _WITHIN:
            inside = max(inside, _depth_of(each, longest))
    return inside + 1


def _nought(number: str) -> int:
    if "e" in number or "E" in number:
        raise _NotPlain
    return 0


def _refuse(_: str) -> NoReturn:
    raise _NotPlain
