"""A transactional outbox on PostgreSQL that keeps secondary backends equal to the primary, and proves it."""

from outbox.answer import SyncResult, SyncState, SyncStatus
from outbox.bulk import BulkStatus, FailedResource
from outbox.errors import (
    InvalidEvent,
    InvalidToken,
    NoSecondary,
    NotInTransaction,
    OutboxError,
    ResourceBusy,
    ResourceRefused,
    SchemaMissing,
    SecondaryError,
    SettingsError,
    StorageError,
    Unavailable,
    UnknownSecondary,
    UntrackedWrite,
)
from outbox.event import FhirVersion, Operation, StoredResource, SyncEvent
from outbox.headers import headers
from outbox.health import Health, HealthPart
from outbox.manager import SyncManager
from outbox.operate import Which
from outbox.reconcile import Drift, ReconciliationResult, SyncReconciler
from outbox.record import record
from outbox.register import Registration
from outbox.relay import Relay
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Secondary, Stale
from outbox.secondaries.memory import MemorySecondary
from outbox.secondaries.storage import ResourceStorage, ResourceStorageSecondary
from outbox.session import OutboxSession, SyncOutboxSession
from outbox.settings import SyncConfig, SyncMode
from outbox.status import BackendSyncStatus, Failure
from outbox.token import SyncToken

__all__ = [
    "Applied",
    "BackendSyncStatus",
    "BulkStatus",
    "Drift",
    "FailedResource",
    "Failure",
    "FhirVersion",
    "Health",
    "HealthPart",
    "InvalidEvent",
    "InvalidToken",
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
    "ResourceBusy",
    "ResourceDigest",
    "ResourceRefused",
    "ResourceStorage",
    "ResourceStorageSecondary",
    "Retry",
    "RetryPolicy",
    "SchemaMissing",
    "Secondary",
    "SecondaryError",
    "SettingsError",
    "Stale",
    "StorageError",
    "StoredResource",
    "SyncConfig",
    "SyncEvent",
    "SyncManager",
    "SyncMode",
    "SyncOutboxSession",
    "SyncReconciler",
    "SyncResult",
    "SyncState",
    "SyncStatus",
    "SyncToken",
    "Unavailable",
    "UnknownSecondary",
    "UntrackedWrite",
    "Which",
    "headers",
    "record",
]
