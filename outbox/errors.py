"""Every error this package raises, as one tree.

OutboxError
├── SettingsError         a setting is out of range, or two contradict each other
├── InvalidEvent          an event cannot be stored and delivered exactly; nothing was written
├── NotInTransaction      an event was recorded where no transaction would carry it
├── UntrackedWrite        a write to a tracked class would have left no event
├── UnknownSecondary      a name that the registry, or this process, does not have
├── StillOwed             a secondary was to be removed that is still owed something
├── NoSecondary           an event was recorded before any secondary was registered
├── InvalidToken          a text is not a token of ours
├── NotForgotten          a resource cannot be erased while the primary has it; nothing was changed
├── SchemaMissing         the outbox tables are absent, or older than this code
├── StorageError          what a resource store raises about one resource
│   ├── ResourceBusy      it may be taken later
│   └── ResourceRefused   it never will be
└── SecondaryError
    └── Unavailable       the secondary, not the event, is what failed

A lost lease is not an error but an empty answer, and a failed event is not an error but an outcome.
No error carries content: messages name paths, keys and codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

__all__ = [
    "InvalidEvent",
    "InvalidToken",
    "NoSecondary",
    "NotForgotten",
    "NotInTransaction",
    "OutboxError",
    "ResourceBusy",
    "ResourceRefused",
    "SchemaMissing",
    "SecondaryError",
    "SettingsError",
    "StillOwed",
    "StorageError",
    "Unavailable",
    "UnknownSecondary",
    "UntrackedWrite",
]


class OutboxError(Exception):
    """Base of every error raised on purpose by this package."""


class SettingsError(OutboxError):
    """A setting cannot work: names the field and what was expected of it."""

    def __init__(self, field: str, expectation: str) -> None:
        super().__init__(f"setting {field!r}: {expectation}")
        self.field = field
        self.expectation = expectation


class InvalidEvent(OutboxError):
    """An event was refused before any SQL; the caller's transaction is untouched.

    `path` is where in the event the problem sits (`content.name[0].given`, `resource_id`), never the value.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class NotInTransaction(OutboxError):
    """An event was recorded on a connection with no open transaction to share with its change."""


class UntrackedWrite(OutboxError):
    """A write to a tracked class was refused because it would have left no event."""


class UnknownSecondary(OutboxError):
    """A secondary was named that is not known here."""

    def __init__(self, backend_id: str, hint: str) -> None:
        super().__init__(f"secondary {backend_id!r} is unknown: {hint}")
        self.backend_id = backend_id


class StillOwed(OutboxError):
    """A secondary was to be removed while something is owed to it, and nobody said that it may be given up."""

    def __init__(self, backend_id: str, pending: int, dead: int) -> None:
        super().__init__(
            f"secondary {backend_id!r} is still owed {pending:,} deliveries, {dead:,} of its keys are dead: "
            "drain it first, or give them up"
        )
        self.backend_id = backend_id
        self.pending = pending
        self.dead = dead


class NoSecondary(OutboxError):
    """An event was recorded while the registry of secondaries was empty: nobody would ever get it."""


class InvalidToken(OutboxError):
    """A text was given as a token that is none, or is damaged, or is of a later version."""

    def __init__(self) -> None:
        super().__init__("token: this is not a token that record() or a session gave; pass it on unchanged")


class NotForgotten(OutboxError):
    """A resource was to be erased that the primary has, or may have again in a moment; nothing was changed."""


class SchemaMissing(OutboxError):
    """The outbox tables are not there or not new enough; `outbox migrate` brings them."""


class StorageError(OutboxError):
    """Base of what a `ResourceStorage` raises about one resource; `code` and `problem` never hold content."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(f"{code}: {problem}")
        self.code = code
        self.problem = problem


class ResourceBusy(StorageError):
    """A store could not take one resource now: a deadlock, a lock, a conflict. `retry_after` is a wait it asked for."""

    def __init__(self, code: str, problem: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(code, problem)
        self.retry_after = retry_after


class ResourceRefused(StorageError):
    """A store will never take one resource as it is: it is invalid, or more than the store can hold."""


class SecondaryError(OutboxError):
    """Base of what a secondary may raise to the relay."""


class Unavailable(SecondaryError):
    """The secondary cannot take anything now; no event is to blame and none spends an attempt.

    `code` is a short stable word for status pages (`refused`, `timeout`, `throttled`); `retry_after` is how long the
    secondary asked to be left alone, if it said so. `known` has what became of the batch's events before, None where
    that is not known: one that went away half-way costs the rest no attempt either.
    """

    def __init__(
        self,
        code: str,
        problem: str,
        *,
        retry_after: timedelta | None = None,
        known: Sequence[object | None] = (),
    ) -> None:
        super().__init__(f"{code}: {problem}")
        self.code = code
        self.problem = problem
        self.retry_after = retry_after
        self.known = known
