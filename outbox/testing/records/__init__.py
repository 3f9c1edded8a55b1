"""Records: everything a history can say, one struct per line.

`at` is an instant of `time.monotonic_ns`, which all processes of one machine share; who cannot know a thing leaves its
field out, and the checks that need it say "unknown". Instants of the primary's own clock are microseconds. A digest is
`content_digest` of the content, and empty for a delete.
"""

from __future__ import annotations

from outbox.testing.records.final import Attempted, Contents, Dumped, GivenUp, Held, Kept, Owed, Registered, Rows
from outbox.testing.records.ground import Entry, Key, Said
from outbox.testing.records.run import (
    Answered,
    Applied,
    Asked,
    Began,
    Claimed,
    Counted,
    Damaged,
    Did,
    Drained,
    Ended,
    Finished,
    Fired,
    Healed,
    Measured,
    Opened,
    Promised,
    Pruned,
    Reconciled,
    Recorded,
    Refused,
    Settled,
    Told,
    Undone,
    Waiting,
)

__all__ = [
    "Answered",
    "Applied",
    "Asked",
    "Attempted",
    "Began",
    "Claimed",
    "Contents",
    "Counted",
    "Damaged",
    "Did",
    "Drained",
    "Dumped",
    "Ended",
    "Entry",
    "Finished",
    "Fired",
    "GivenUp",
    "Healed",
    "Held",
    "Kept",
    "Key",
    "Measured",
    "Opened",
    "Owed",
    "Promised",
    "Pruned",
    "Reconciled",
    "Record",
    "Recorded",
    "Refused",
    "Registered",
    "Rows",
    "Said",
    "Settled",
    "Told",
    "Undone",
    "Waiting",
]

Record = (
    Opened
    | Promised
    | Began
    | Recorded
    | Undone
    | Ended
    | Claimed
    | Settled
    | Asked
    | Applied
    | Refused
    | Answered
    | Fired
    | Healed
    | Damaged
    | Waiting
    | Told
    | Reconciled
    | Pruned
    | Counted
    | Did
    | Drained
    | Measured
    | Kept
    | Owed
    | Attempted
    | Held
    | GivenUp
    | Registered
    | Rows
    | Contents
    | Dumped
    | Finished
)
