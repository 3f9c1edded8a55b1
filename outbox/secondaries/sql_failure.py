"""What goes wrong in a SQL secondary, as codes that are safe to store: never a text, as those quote values."""

from __future__ import annotations

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

__all__ = ["FAILURES", "code_of", "is_contention", "is_fault_of_a_row", "is_locked", "is_overtime"]

# What asyncpg raises while connecting reaches us as it is.
FAILURES = (DBAPIError, PoolTimeout, OSError, asyncpg.PostgresError, asyncpg.InterfaceError)

# What one row can be blamed for: data, integrity, view check, raised by a trigger, program limits. MySQL's numbers
# stand where its SQLSTATE says nothing, or its driver keeps that to itself: null, duplicate, out of range, wrong value
# for a date or a field, too long, signalled by a trigger, check violated there and in MariaDB.
_MYSQL_ROW_AT_FAULT = ("1048", "1062", "1264", "1292", "1366", "1406", "1644", "3819", "4025")
_ROW_AT_FAULT = ("22", "23", "44", "45", "54", "P0", *_MYSQL_ROW_AT_FAULT, "SQLITE_CONSTRAINT", "SQLITE_TOOBIG")
# Lock not available, and MySQL's lock wait timeout.
_LOCKED = ("55P03", "1205")
# Serialization failure, deadlock, and MySQL's deadlock.
_CONTENDED = ("40001", "40P01", "1213", *_LOCKED)
# The server's own limit for a statement was reached: PostgreSQL's, MariaDB's, MySQL's.
_OVERTIME = ("57014", "70100", "1969", "3024")


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE, the driver's number or a word."""
    if isinstance(error, (TimeoutError, PoolTimeout)):
        return "timeout"
    if isinstance(error, OSError):
        return "refused" if isinstance(error, ConnectionRefusedError) else "unreachable"
    cause = error.orig if isinstance(error, DBAPIError) else error
    for name in ("sqlstate", "sqlite_errorname"):
        code = getattr(cause, name, None)
        if isinstance(code, str) and code != "HY000":
            return code
    number = next(iter(getattr(cause, "args", ())), None)
    return str(number) if isinstance(number, int) else type(cause).__name__


def is_contention(error: BaseException) -> bool:
    """Say whether other writers were in the way, so that the same may succeed when tried again."""
    return code_of(error).startswith(_CONTENDED)


def is_locked(error: BaseException) -> bool:
    """Say whether a lock was waited for in vain; whoever loses to another writer meets a database that takes writes."""
    return code_of(error).startswith(_LOCKED)


def is_fault_of_a_row(error: BaseException) -> bool:
    """Say whether one row of the batch may have spoiled it for the others."""
    return code_of(error).startswith(_ROW_AT_FAULT)


def is_overtime(error: BaseException) -> bool:
    """Say whether time ran out, here or there, which one row may be the cause of."""
    return code_of(error).startswith(("timeout", *_OVERTIME))
