"""A transactional outbox on PostgreSQL that keeps secondary backends equal to the primary, and proves it."""

from outbox.ahead import Moved
from outbox.answer import SyncResult, SyncState, SyncStatus
from outbox.backfill import BackfillProgress
from outbox.bulk import BulkStatus, FailedResource
from outbox.errors import (
    InvalidEvent,
    InvalidToken,
    NoSecondary,
    NotForgotten,
    NotInTransaction,
    OutboxError,
    ResourceBusy,
    ResourceRefused,
    SchemaMissing,
    SecondaryError,
    SettingsError,
    StillOwed,
    StorageError,
    Unavailable,
    UnknownSecondary,
    UntrackedWrite,
)
from outbox.event import FhirVersion, Operation, StoredResource, SyncEvent
from outbox.finding import Finding, Verdict
from outbox.forget import Evidence
from outbox.headers import headers
from outbox.health import Health, HealthPart
from outbox.judge import Drift
from outbox.manager import SyncManager
from outbox.operate import Which
from outbox.reconcile import SyncReconciler
from outbox.reconciliation import ReconciliationResult
from outbox.record import record
from outbox.register import Registration
from outbox.relay import Relay
from outbox.retire import Removal
from outbox.retry import RetryPolicy
from outbox.roster import Addition
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Secondary, Stale
from outbox.secondaries.memory import MemorySecondary
from outbox.secondaries.storage import ResourceStorage, ResourceStorageSecondary
from outbox.session import OutboxSession, SyncOutboxSession
from outbox.settings import SyncConfig, SyncMode
from outbox.status import BackendSyncStatus, Checked, Failure
from outbox.story import Story
from outbox.token import SyncToken

__all__ = [
    "Addition",
    "Applied",
    "BackendSyncStatus",
    "BackfillProgress",
    "BulkStatus",
    "Checked",
    "Drift",
    "Evidence",
    "FailedResource",
    "Failure",
    "FhirVersion",
    "Finding",
    "Health",
    "HealthPart",
    "InvalidEvent",
    "InvalidToken",
    "MemorySecondary",
    "Moved",
    "NoSecondary",
    "NotForgotten",
    "NotInTransaction",
    "Operation",
    "OutboxError",
    "OutboxSession",
    "Outcome",
    "ReconciliationResult",
    "Registration",
    "Rejected",
    "Relay",
    "Removal",
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
    "StillOwed",
    "StorageError",
    "StoredResource",
    "Story",
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
    "Verdict",
    "Which",
    "headers",
    "record",
]
