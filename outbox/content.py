"""Content goes in and out as exact JSON text; whatever JSON cannot carry exactly is refused with its path."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from outbox.errors import InvalidEvent, SettingsError
from outbox.plain import ENCODER, is_plain_text, text_of_plain

__all__ = [
    "DEFAULT_LIMITS",
    "Limits",
    "canonical",
    "canonical_value",
    "content_digest",
    "encode_content",
    "fingerprint",
    "text_of",
]

# A path is a chain of (parent, step); it is only rendered when something is refused.
_Path = tuple["_Path | None", "str | int"]
_ROOT: _Path = (None, "content")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an event may measure; everything beyond is refused before SQL.

    All sizes are UTF-8 bytes. Defaults: content 1 MiB, nesting 64, resource id 512, one JSON key 1,024.
    """

    content_bytes: int = 1_048_576
    depth: int = 64
    id_bytes: int = 512
    key_bytes: int = 1_024

    def __post_init__(self) -> None:
        """Raise `SettingsError` for an id that the index of held keys could not take."""
        if self.id_bytes > 2_048:
            raise SettingsError("id_bytes", "must not exceed 2,048")


DEFAULT_LIMITS = Limits()


class _Pairs(list[tuple[str, Any]]):
    """A parsed JSON object that still shows its repeated keys."""


def encode_content(content: dict[str, Any] | str | bytes, limits: Limits = DEFAULT_LIMITS) -> str:
    """Return the JSON text of a resource, or raise `InvalidEvent` naming the path that cannot be kept exactly.

    A dict is serialised; text is checked and kept to the letter, so decimals and key order survive.
    Refused: anything but an object at the top, keys that are not text, repeated keys, NaN and infinities,
    NUL, lone surrogates, values JSON has no word for, and whatever exceeds `limits`.
    """
    if isinstance(content, (str, bytes)):
        text = _decoded(content)
        _check_size(text, limits)
        if not is_plain_text(text, limits.depth, limits.key_bytes):
            _walk(_parsed(text), limits)
        return text
    plain = text_of_plain(content, limits.depth, limits.key_bytes)
    if plain is None:
        _walk(content, limits)
    text = plain or _serialised(content)
    _check_size(text, limits)
    return text


def text_of(content: dict[str, Any] | str | bytes) -> str:
    """Return the text that `encode_content` would, without its checks. Raises `InvalidEvent` when there is none."""
    if isinstance(content, (str, bytes)):
        return _decoded(content)
    try:
        return _serialised(content)
    except (TypeError, ValueError):
        raise InvalidEvent("content", "holds what JSON has no word for") from None


def canonical(content: str) -> str:
    """Return the canonical form two sides are compared in.

    Keys sorted by code point, no white space, Unicode untouched, numbers by exact decimal value
    (`1`, `1.0` and `1e0` are one number, `0.1` and `0.10` too; no binary float is ever involved).
    """
    value = json.loads(content, parse_float=Decimal, parse_int=Decimal)
    return "".join(_canonical_parts(value))


def content_digest(content: str) -> str:
    """Return the 32 hex digits (BLAKE2b, 128 bits) of the canonical form."""
    return hashlib.blake2b(canonical(content).encode(), digest_size=16).hexdigest()


def fingerprint(resource_id: str, content: str) -> int:
    """Return the 60-bit number that stands for a resource in the summary of a range.

    The first 15 hex digits of the MD5 of id, line feed and content, to the letter: what every database can compute and
    sum up. Equal sums mean equal texts; different sums only that somebody must look at the canonical form.
    """
    text = f"{resource_id}\n{content}".encode()
    return int(hashlib.md5(text, usedforsecurity=False).hexdigest()[:15], 16)


def _canonical_parts(value: Any) -> list[str]:
    if isinstance(value, dict):
        inner = [f"{json.dumps(k, ensure_ascii=False)}:{canonical_value(value[k])}" for k in sorted(value)]
        return ["{", ",".join(inner), "}"]
    if isinstance(value, list):
        return ["[", ",".join(canonical_value(item) for item in value), "]"]
    return [canonical_value(value)]


def canonical_value(value: Any) -> str:
    """Return the canonical form of a parsed JSON value whose numbers are all `Decimal`."""
    if isinstance(value, Decimal):
        return _canonical_number(value)
    if isinstance(value, (dict, list)):
        return "".join(_canonical_parts(value))
    return json.dumps(value, ensure_ascii=False)


def _canonical_number(value: Decimal) -> str:
    """Digits and exponent without trailing zeros: cheap also for 1e1000000, which has no other short form."""
    sign, digits, exponent = value.as_tuple()
    text = "".join(map(str, digits)).lstrip("0")
    stripped = text.rstrip("0")
    if not stripped:
        return "0"
    assert isinstance(exponent, int)
    return f"{'-' if sign else ''}{stripped}e{exponent + len(text) - len(stripped)}"


def _decoded(content: str | bytes) -> str:
    if isinstance(content, str):
        return content
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidEvent("content", "is not UTF-8") from None


def _parsed(text: str) -> Any:
    try:
        # Numbers stay text to the letter, so parsing must not be stopped by their size.
        return json.loads(
            text,
            object_pairs_hook=_Pairs,
            parse_constant=_refuse_constant,
            parse_int=lambda _: 0,
            parse_float=_checked_float,
        )
    except RecursionError:
        raise InvalidEvent("content", "is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidEvent("content", f"is not JSON (at character {error.pos})") from None


def _checked_float(text: str) -> int:
    try:
        Decimal(text)
    except InvalidOperation:
        raise InvalidEvent("content", "holds a number whose exponent nobody can compare") from None
    return 0


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidEvent("content", f"holds {name}, which JSON does not have")


def _serialised(content: Any) -> str:
    try:
        return ENCODER.encode(content)
    except RecursionError:
        raise InvalidEvent("content", "is nested too deeply") from None


def _check_size(text: str, limits: Limits) -> None:
    # Only text near the limit pays for being measured in bytes.
    if len(text) * 4 <= limits.content_bytes:
        return
    if len(text.encode(errors="replace")) > limits.content_bytes:
        raise InvalidEvent("content", f"is larger than {limits.content_bytes} bytes")


def _walk(content: Any, limits: Limits) -> None:
    """Visit every value once, without recursion, so that depth is our limit and not the interpreter's."""
    if not isinstance(content, (dict, _Pairs)):
        raise InvalidEvent("content", "must be a JSON object")
    pending: list[tuple[Any, _Path, int]] = [(content, _ROOT, 1)]
    while pending:
        value, path, depth = pending.pop()
        if value is None or value is True or value is False:
            continue
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, (int, float)):
            _check_number(value, path)
        elif depth > limits.depth:
            raise InvalidEvent(_render(path), f"is nested deeper than {limits.depth}")
        else:
            pending.extend(_children(value, path, depth, limits))


def _children(value: Any, path: _Path, depth: int, limits: Limits) -> list[tuple[Any, _Path, int]]:
    if isinstance(value, _Pairs):
        pairs: Any = value
        if len({key for key, _ in value}) != len(value):
            raise InvalidEvent(_render(path), "has a key twice")
    elif isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        return [(item, (path, index), depth + 1) for index, item in enumerate(value)]
    else:
        raise InvalidEvent(
            _render(path), f"is a {type(value).__name__}, which JSON has no word for; convert it explicitly"
        )
    return [(item, (path, _checked_key(key, path, limits)), depth + 1) for key, item in pairs]


def _checked_key(key: Any, path: _Path, limits: Limits) -> str:
    if not isinstance(key, str):
        raise InvalidEvent(_render(path), f"has a key of type {type(key).__name__}; JSON keys are text")
    _check_text(key, path)
    if len(key) * 4 > limits.key_bytes and len(key.encode()) > limits.key_bytes:
        raise InvalidEvent(_render(path), f"has a key longer than {limits.key_bytes} bytes")
    return key


def _check_text(value: str, path: _Path) -> None:
    if "\x00" in value:
        raise InvalidEvent(_render(path), "holds a NUL character, which PostgreSQL cannot store")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidEvent(_render(path), "holds a lone surrogate, which is not Unicode text") from None


def _check_number(value: float, path: _Path) -> None:
    if isinstance(value, int) and value.bit_length() > 2_000:
        try:
            str(value)
        except ValueError:
            raise InvalidEvent(_render(path), "is an integer with more digits than Python will print") from None
    if isinstance(value, float) and value - value != 0:
        raise InvalidEvent(_render(path), "is not a finite number, which JSON does not have")


def _render(path: _Path) -> str:
    steps: list[str] = []
    node: _Path | None = path
    while node is not None:
        node, step = node
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}"[:80])
    return "".join(reversed(steps)).removeprefix(".")
