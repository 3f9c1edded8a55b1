"""Session: SQLAlchemy sessions that record events in the transaction of the change they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import ClauseElement, Delete, Update, event, inspect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

from outbox.capture import Changes, Tracked, Tracking
from outbox.errors import InvalidEvent, SettingsError, UntrackedWrite
from outbox.event import Operation, SyncEvent
from outbox.headers import Carrying, carrying, checked_headers
from outbox.mass import recorded_by, returning_rows, written_by
from outbox.record import record, refuse_autocommit
from outbox.token import SyncToken

__all__ = ["OutboxSession", "SyncOutboxSession"]

_PAGE = 1_000


class SyncOutboxSession(Session):
    """A `Session` that records the changes of tracked classes at flush, after their rows and in their transaction.

    Made by `SyncManager.sync_session()`. Bulk updates, deletes and inserts of tracked classes are refused with
    `UntrackedWrite`; `execute_recorded` is the call to use. What no session can see (raw SQL, database cascades, other
    programs) leaves no event: record it by hand, or let reconcile find it.

    `correlation_id`, `actor`, `traceparent` and `headers` are carried by every event of this session (D67); see
    `outbox.headers`. Raises `InvalidEvent` when they cannot be.
    """

    def __init__(
        self,
        bind: Any,
        *,
        tracking: Tracking,
        ring: Callable[[], None],
        schema: str,
        correlation_id: str | None = None,
        actor: str | None = None,
        traceparent: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        if options.get("binds"):
            raise SettingsError("binds", "must be left out; events and rows share one connection")
        super().__init__(bind, **options)
        self.tracking = tracking
        self._ring = ring
        self._schema = schema
        self._headers = checked_headers(correlation_id, actor, traceparent, headers)
        self._recorded = Carrying()
        self._tokens: list[tuple[list[SessionTransaction], SyncToken]] = []
        self.token: SyncToken | None = None
        # While rows are looked at before a flush; and once a commit has been prepared as far as we are asked.
        self.checking = self.committing = False
        self.info["outbox_changes"] = Changes(tracking)

    def record(self, *events: SyncEvent | Iterable[SyncEvent]) -> None:
        """Have events written with the next flush that writes anything, or at commit, in the order of the calls."""
        # As add() does: what is recorded belongs to a transaction from here on, and ends with it.
        if not self.in_transaction():
            self.begin()
        for each in events:
            self._recorded += carrying([each] if isinstance(each, SyncEvent) else each, self._headers)
        if self.committing and not self._flushing:
            # Whoever is asked before the commit later than we are.
            self.write_all()

    def execute_recorded(self, statement: Update | Delete) -> int:
        """Run a bulk update or delete of a tracked class and record one event per row; return how many rows.

        The rows come back through RETURNING in pages of 1,000, so memory stays bounded. Raises `UntrackedWrite` for
        other statements, and for updates of what resources go by; where that is computed by a function, see to it.
        """
        tracked = recorded_by(self.tracking, statement)
        refuse_autocommit(self.connection())
        # A refused row takes the whole statement back, and leaves the transaction usable.
        with self.begin_nested():
            return self._execute_recorded(statement, tracked)

    def _execute_recorded(self, statement: Update | Delete, tracked: Tracked) -> int:
        operation = Operation.UPDATE if isinstance(statement, Update) else Operation.DELETE
        options: dict[str, Any] = {"outbox_recorded": True, "populate_existing": True}
        # psycopg streams through DECLARE CURSOR, which takes no UPDATE.
        if self.connection().dialect.driver == "asyncpg":
            options["yield_per"] = _PAGE
        rows = self.scalars(returning_rows(statement, tracked), execution_options=options)
        count = 0
        for page in rows.partitions(_PAGE):
            # A subclass may be tracked as what it is.
            events = [(self.tracking.of(type(row)) or tracked).event(operation, row) for row in page]
            count += len(events)
            self.write(events)
        return count

    def write(self, events: Sequence[SyncEvent]) -> None:
        """Write events now, on this transaction's connection."""
        if events:
            token = record(self.connection(), carrying(events, self._headers), schema=self._schema)
            self._tokens.append((list(self._savepoints()), token))

    def write_all(self) -> None:
        """Write everything, the business rows first: their locks put the events of one key in commit order."""
        self.flush()
        self.write_recorded()

    def write_recorded(self) -> None:
        """Write what `record` has gathered."""
        events, self._recorded = self._recorded, Carrying()
        self.write(events)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin, or open a savepoint; what was recorded before a savepoint does not share its fate."""
        if nested:
            self.write_all()
        return super().begin(nested)

    def forget(self, *, everything: bool) -> None:
        """Drop what was gathered and not yet written; with the outermost transaction, also what was."""
        if everything:
            self._tokens.clear()
        self._recorded.clear()
        self.info["outbox_changes"].clear()

    def ring(self) -> None:
        """Tell the relays, once the outermost transaction has committed events, and keep its token."""
        if self._tokens and not self.in_nested_transaction():
            self.token = SyncToken.merged(token for _, token in self._tokens)
            self._tokens.clear()
            self._ring()

    def undo(self, savepoint: SessionTransaction) -> None:
        """Drop the tokens of what a savepoint wrote that was rolled back."""
        self._tokens = [each for each in self._tokens if savepoint not in each[0]]

    def _savepoints(self) -> Iterator[SessionTransaction]:
        """Yield everything that could take back what is written now, the innermost first."""
        transaction = self.get_nested_transaction()
        while transaction is not None:
            yield transaction
            transaction = transaction.parent

    def bulk_save_objects(self, *_args: Any, **_options: Any) -> None:
        """Refused: it bypasses the flush that records events."""
        raise _bypass("bulk_save_objects")

    def bulk_insert_mappings(self, *_args: Any, **_options: Any) -> None:
        """Refused: it bypasses the flush that records events."""
        raise _bypass("bulk_insert_mappings")

    def bulk_update_mappings(self, *_args: Any, **_options: Any) -> None:
        """Refused: it bypasses the flush that records events."""
        raise _bypass("bulk_update_mappings")


class OutboxSession(AsyncSession):
    """An `AsyncSession` whose `sync_session` records events. Made by `SyncManager.session()`."""

    sync_session_class = SyncOutboxSession
    sync_session: SyncOutboxSession

    @property
    def token(self) -> SyncToken | None:
        """What the last commit that wrote events recorded, to wait on; None before there was one."""
        return self.sync_session.token

    def record(self, *events: SyncEvent | Iterable[SyncEvent]) -> None:
        """Have events written with the next flush that writes anything, or at commit, in the order of the calls."""
        self.sync_session.record(*events)

    async def execute_recorded(self, statement: Update | Delete) -> int:
        """Run a bulk update or delete of a tracked class and record one event per row; return how many rows."""
        return await self.run_sync(lambda _: self.sync_session.execute_recorded(statement))


def _bypass(call: str) -> UntrackedWrite:
    return UntrackedWrite(f"{call}: writes past the flush that records events; use add_all(), or execute_recorded()")


class _TooEarly(Exception):
    """Other rows were asked for before a flush: they would be kept as they are, and the event made of that after it."""


@event.listens_for(SyncOutboxSession, "before_flush")
def _refuse_early(session: SyncOutboxSession, _context: Any, _instances: Any) -> None:
    """Refuse bad content before any SQL, while the transaction is still whole.

    A mapping that needs what only the database can give (a generated key) may fail here; it is asked again after
    the rows were written.
    """
    announced = list(_announced(session))
    session.checking = True
    try:
        for tracked, operation, row in announced:
            _check(tracked, operation, row)
    finally:
        session.checking = False
    if announced:
        refuse_autocommit(session.connection())


def _announced(session: SyncOutboxSession) -> Iterator[tuple[Tracked, Operation, Any]]:
    """Yield what a flush is about to write of tracked classes."""
    for operation, rows in (
        (Operation.CREATE, session.new),
        (Operation.UPDATE, session.dirty),
        (Operation.DELETE, session.deleted),
    ):
        for row in rows:
            tracked = session.tracking.of(type(row))
            if tracked is not None and (operation is not Operation.UPDATE or session.is_modified(row)):
                yield tracked, operation, row


def _check(tracked: Tracked, operation: Operation, row: Any) -> None:
    values = inspect(row).dict.values()
    if any(isinstance(value, ClauseElement) for value in values):
        return  # the database computes it
    # What a mapping raises for a value that is not there yet says nothing; afterwards it does.
    unknown = operation is Operation.CREATE and None in inspect(row).mapper.primary_key_from_instance(row)
    try:
        with suppress(_TooEarly, AttributeError, LookupError, TypeError, ValueError):
            tracked.event(operation, row)
    except InvalidEvent as error:
        if not unknown or error.path.startswith("content"):
            raise


@event.listens_for(SyncOutboxSession, "after_flush_postexec")
def _record_changes(session: SyncOutboxSession, _context: Any) -> None:
    # Only now do the objects stand for their rows: what the database filled in, or kept when a deleted row was
    # added again, is loaded when a mapping asks for it.
    changes: Changes = session.info["outbox_changes"]
    found = list(changes)
    changes.clear()
    events: list[SyncEvent] = []
    for change in found:
        if change.switched:
            session.expire(change.row, list(inspect(change.row).unloaded))
        tracked = session.tracking.of(type(change.row))
        assert tracked is not None, "only rows of tracked classes are collected"
        events += tracked.events(change)
    # What is there after a flush was written by it last, in whichever order SQLAlchemy wrote the rows of one name.
    session.write(sorted(events, key=lambda each: each.operation is not Operation.DELETE))
    session.write_recorded()


@event.listens_for(SyncOutboxSession, "before_commit")
def _record_rest(session: SyncOutboxSession) -> None:
    session.write_all()
    session.committing = True


@event.listens_for(SyncOutboxSession, "after_commit")
def _ring(session: SyncOutboxSession) -> None:
    session.ring()


@event.listens_for(SyncOutboxSession, "after_soft_rollback")
def _forget(session: SyncOutboxSession, previous: SessionTransaction) -> None:
    # A flush that fails rolls back all that it lies in up to a savepoint, and names only its own part of that.
    while not previous.nested and previous.parent is not None:
        previous = previous.parent
    session.forget(everything=not previous.nested)
    session.undo(previous)


@event.listens_for(SyncOutboxSession, "after_transaction_end")
def _end(session: SyncOutboxSession, ended: SessionTransaction) -> None:
    if ended.parent is None or ended.nested:
        session.committing = False
    if ended.parent is None:
        session.forget(everything=True)


@event.listens_for(SyncOutboxSession, "do_orm_execute")
def _refuse_bypass(state: ORMExecuteState) -> None:
    session = state.session
    assert isinstance(session, SyncOutboxSession)
    if session.checking and state.is_relationship_load:
        raise _TooEarly
    if not (state.is_update or state.is_delete or state.is_insert):
        return
    if state.execution_options.get("outbox_recorded"):
        return
    tracked = written_by(session.tracking, state.statement)
    if tracked is not None:
        raise UntrackedWrite(
            f"a bulk write of {tracked.entity.__name__} would leave no event; "
            "use session.execute_recorded(statement), or change the objects and let flush record them"
        )
