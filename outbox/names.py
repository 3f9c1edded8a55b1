"""The short texts of an event (ids, tenant, version, headers): kept to the letter, or refused by their name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from outbox.content import DEFAULT_LIMITS, Limits, encode_content
from outbox.errors import InvalidEvent

__all__ = [
    "ACTOR",
    "CORRELATION_ID",
    "TRACEPARENT",
    "check_name",
    "check_tenant",
    "checked_version",
    "encode_headers",
    "header_in",
    "parsed_headers",
]

ACTOR = "actor"
CORRELATION_ID = "correlation-id"
TRACEPARENT = "traceparent"

_TENANT = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
# Control characters break URLs, headers and terminals; everything else is kept byte for byte.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# W3C Trace Context: ids of zeros say nothing, ff is no version, and only versions after 00 may say more.
_TRACEPARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def check_name(field: str, value: Any, most_bytes: int) -> str:
    """Return a short text, or raise `InvalidEvent` for what is not text, empty, too long or not printable."""
    if not isinstance(value, str):
        raise InvalidEvent(field, f"must be text, not {type(value).__name__}")
    if value.isascii() and value.isprintable() and 0 < len(value) <= most_bytes:
        # Nearly every one, and three for every event.
        return value
    if not value:
        raise InvalidEvent(field, "is empty")
    if _CONTROL.search(value):
        raise InvalidEvent(field, "holds a control character")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidEvent(field, "holds a lone surrogate, which is not Unicode text") from None
    if size > most_bytes:
        raise InvalidEvent(field, f"is longer than {most_bytes} bytes")
    return value


def check_tenant(value: Any) -> None:
    """Raise `InvalidEvent` for a tenant that could not stand in a URL or an index name."""
    check_name("tenant_id", value, 64)
    if not _TENANT.fullmatch(value):
        raise InvalidEvent("tenant_id", "takes ASCII letters, digits, '-', '_', '.', and '/' between segments")


def checked_version(version: Any) -> str | None:
    """Return a version as text, or raise `InvalidEvent`."""
    if version is None:
        return None
    # bool is an int and 1.5 would be cut: both have silently become "1" elsewhere.
    if isinstance(version, bool) or not isinstance(version, (str, int)):
        raise InvalidEvent("version", f"must be text or a whole number, not {type(version).__name__}")
    if isinstance(version, int) and not 0 <= version < 2**63:
        raise InvalidEvent("version", "must be from 0 to 2^63 - 1 when it is a number")
    return check_name("version", str(version), 128)


def encode_headers(headers: Mapping[str, str], limits: Limits = DEFAULT_LIMITS) -> str:
    """Return headers as JSON text. Raises `InvalidEvent`; the path names a header only where the name is ours."""
    if not isinstance(headers, Mapping):
        raise InvalidEvent("headers", f"must be a mapping, not {type(headers).__name__}")
    for name, value in headers.items():
        check_name("headers", name, 128)
        path = f"headers.{name}" if name in {ACTOR, CORRELATION_ID, TRACEPARENT} else "headers"
        check_name(path, value, 1024)
        if name == TRACEPARENT and not _TRACEPARENT.fullmatch(value):
            raise InvalidEvent(path, "is not a W3C traceparent")
    try:
        return encode_content(dict(headers), limits)
    except InvalidEvent as error:
        raise InvalidEvent("headers", error.problem) from None


def header_in(encoded: str, name: str) -> str | None:
    """Return one of the headers in JSON text; None without it, also in what somebody inserted by hand."""
    value = parsed_headers(encoded).get(name)
    return value if isinstance(value, str) else None


def parsed_headers(encoded: str) -> dict[str, Any]:
    """Return headers from JSON text; none from what is not an object, which somebody inserted by hand."""
    try:
        parsed = json.loads(encoded)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
