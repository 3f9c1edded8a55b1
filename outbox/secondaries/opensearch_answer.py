"""What a search server answered to one request, before anyone looks inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from outbox.errors import Unavailable

__all__ = ["Answer", "error_type", "raise_refused", "raise_unreadable", "retry_after_of"]

_LONGEST_WAIT = timedelta(hours=1)
_ERROR_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_CODES = {401: "unauthorized", 403: "forbidden", 429: "throttled"}


class Answer(msgspec.Struct, frozen=True):
    """What came back: the status, the bytes, and how long the server asked to be left alone."""

    status: int
    body: bytes
    retry_after: timedelta | None = None

    @property
    def error(self) -> str:
        """The server's own word for what went wrong, else `http_` and the status."""
        try:
            found = msgspec.json.decode(self.body, type=_ErrorBody).error.type
        except msgspec.MsgspecError:
            return f"http_{self.status}"
        return error_type(found)


class _ErrorType(msgspec.Struct):
    type: str


class _ErrorBody(msgspec.Struct):
    error: _ErrorType


def raise_refused(answer: Answer) -> None:
    """Raise `Unavailable` unless the whole request was answered with success."""
    if 200 <= answer.status < 300:
        return
    redirected = 300 <= answer.status < 400
    code = "redirected" if redirected else _CODES.get(answer.status, answer.error)
    raise Unavailable(
        code,
        f"the search server answered the request with status {answer.status}",
        retry_after=answer.retry_after,
    )


def raise_unreadable(answer: Answer) -> None:
    """Raise `Unavailable` unless the answer is a JSON object, as all of a search server's are."""
    try:
        msgspec.json.decode(answer.body, type=dict[str, Any])
    except msgspec.MsgspecError:
        raise Unavailable(
            "unreadable_answer", "what answers is no search server", retry_after=answer.retry_after
        ) from None


def error_type(found: str) -> str:
    """Return a server's error type as a code that is safe to store: short, and without anything but `a-z0-9_`."""
    return found if _ERROR_TYPE.fullmatch(found) else "unnamed_error"


def retry_after_of(headers: Mapping[str, str]) -> timedelta | None:
    """Return the wait a `Retry-After` header asks for, between nothing and an hour; None without one that can be read.

    A date is measured against the answer's own `Date`, so that a wrong clock on either side does no harm.
    """
    value = str(headers.get("Retry-After", "")).strip()
    if value.isascii() and value.isdigit():
        wait = timedelta(seconds=int(value[:9])) if len(value) < 10 else _LONGEST_WAIT
    elif (until := _http_date(value)) is None:
        return None
    else:
        wait = until - (_http_date(str(headers.get("Date", ""))) or datetime.now(UTC))
    return max(timedelta(0), min(wait, _LONGEST_WAIT))


def _http_date(value: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found
