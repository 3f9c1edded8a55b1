"""What goes wrong in a Valkey secondary, as codes that are safe to store."""

from __future__ import annotations

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import TimeoutError as RedisTimeout

__all__ = ["code_of"]

_CODES: dict[type[Exception], str] = {
    TimeoutError: "timeout",
    RedisTimeout: "timeout",
    BusyLoadingError: "LOADING",
    MasterDownError: "MASTERDOWN",
    ReadOnlyError: "READONLY",
    OutOfMemoryError: "OOM",
    AuthenticationError: "NOAUTH",
    NoPermissionError: "NOPERM",
    MovedError: "MOVED",
    AskError: "ASK",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    ClusterCrossSlotError: "CROSSSLOT",
    # What the client raises on an answer that it cannot take apart.
    ValueError: "unreadable_answer",
}


def code_of(error: Exception) -> str:
    """Return a word for what went wrong; of a server's answer only its code, as its text may quote keys."""
    for kind, word in _CODES.items():
        if isinstance(error, kind):
            return word
    if isinstance(error, ResponseError):
        code = str(error).partition(" ")[0]
        return code if code.isascii() and code.isupper() else "ERR"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionRefusedError):
        cause = cause.__cause__ or cause.__context__
    return "disconnected" if cause is None else "refused"
