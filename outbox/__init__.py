"""A transactional outbox on PostgreSQL that keeps secondary backends equal to the primary, and proves it."""

from outbox.errors import (
    InvalidEvent,
    NoSecondary,
    NotInTransaction,
    OutboxError,
    SchemaMissing,
    SecondaryError,
    SettingsError,
    Unavailable,
    UnknownSecondary,
    UntrackedWrite,
)
from outbox.event import FhirVersion, Operation, StoredResource, SyncEvent
from outbox.manager import SyncManager
from outbox.reconcile import Drift, ReconciliationResult, SyncReconciler
from outbox.record import record
from outbox.register import Registration
from outbox.relay import Relay
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Secondary, Stale
from outbox.secondaries.memory import MemorySecondary
from outbox.session import OutboxSession, SyncOutboxSession
from outbox.settings import SyncConfig
from outbox.status import BackendSyncStatus, Failure

__all__ = [
    "Applied",
    "BackendSyncStatus",
    "Drift",
    "Failure",
    "FhirVersion",
    "InvalidEvent",
    "MemorySecondary",
    "NoSecondary",
    "NotInTransaction",
    "Operation",
    "OutboxError",
    "OutboxSession",
    "Outcome",
    "ReconciliationResult",
    "Registration",
    "Rejected",
    "Relay",
    "ResourceDigest",
    "Retry",
    "RetryPolicy",
    "SchemaMissing",
    "Secondary",
    "SecondaryError",
    "SettingsError",
    "Stale",
    "StoredResource",
    "SyncConfig",
    "SyncEvent",
    "SyncManager",
    "SyncOutboxSession",
    "SyncReconciler",
    "Unavailable",
    "UnknownSecondary",
    "UntrackedWrite",
    "record",
]
