"""Register: write to the registry which secondaries there are and what they want."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, text

from outbox.errors import SettingsError
from outbox.secondaries.base import Forgetful, Secondary
from outbox.settings import SyncConfig, SyncMode
from outbox.statement import Statement

__all__ = ["REGISTER", "Registration", "check_together", "register", "register_known"]

# Rows that say the same already are not touched: an upsert would wait for whoever has the secondary's turn.
# Whether it is a shadow is asked of those that are new, and one that was removed comes back as one: it missed events.
REGISTER = Statement("""
insert into {schema}.outbox_secondary as secondary
    (backend_id, role, mode, ordering, tenant_ids, resource_types, status)
select given.backend_id, given.role, given.mode, given.ordering,
       cast(given.tenant_ids as text[]), cast(given.resource_types as text[]),
       case when given.shadow then 'shadow' else 'live' end
from unnest(
    cast(:backend_ids as text[]), cast(:roles as text[]), cast(:modes as text[]), cast(:orderings as text[]),
    cast(:tenant_ids as text[]), cast(:resource_types as text[]), cast(:shadows as boolean[])
) as given (backend_id, role, mode, ordering, tenant_ids, resource_types, shadow)
where not exists (
    select from {schema}.outbox_secondary as known
    where known.backend_id = given.backend_id
      and (known.role, known.mode, known.ordering) = (given.role, given.mode, given.ordering)
      and known.tenant_ids is not distinct from cast(given.tenant_ids as text[])
      and known.resource_types is not distinct from cast(given.resource_types as text[])
      and not (cast(:revive as boolean) and known.status = 'removed')
)
on conflict (backend_id) do update
set role = excluded.role, mode = excluded.mode, ordering = excluded.ordering, tenant_ids = excluded.tenant_ids,
    resource_types = excluded.resource_types,
    status = case when cast(:revive as boolean) and secondary.status = 'removed' then 'shadow'
                  else secondary.status end,
    registered_at = case when cast(:revive as boolean) and secondary.status = 'removed' then excluded.registered_at
                         else secondary.registered_at end
""")

_BACKEND_ID = re.compile(r"[a-z][a-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True)
class Registration:
    """A secondary and its terms: what it is for, which order it needs, which tenants and types it wants (None: all).

    `mode` says whether writers wait for it (None: as `SyncConfig.mode` says).
    With `shadow` a name that is new to the registry gets every event, but nobody waits for it, reads it or is alarmed
    by it before it is promoted; later registrations leave its status as it is.
    `state` order delivers only the newest of several due events of a key; `log` order delivers every event, in order.
    """

    secondary: Secondary
    role: Literal["search", "graph", "terminology", "archive", "cache"] = "search"
    ordering: Literal["state", "log"] = "state"
    tenant_ids: Sequence[str] | None = None
    resource_types: Sequence[str] | None = None
    mode: SyncMode | None = None
    shadow: bool = False

    def __post_init__(self) -> None:
        if not _BACKEND_ID.fullmatch(self.backend_id):
            raise SettingsError("backend_id", f"{self.backend_id!r} must match [a-z][a-z0-9_-]{{0,62}}")

    @property
    def backend_id(self) -> str:
        """The secondary's name."""
        return self.secondary.backend_id


def register(
    connection: Connection, schema: str, registrations: Sequence[Registration], *, revive: bool = True
) -> None:
    """Make the registry say what `registrations` say; from the commit on, every new event is owed to them.

    With `revive` one that was removed comes back as a shadow, without it stays removed.
    """
    parameters: dict[str, Any] = {
        "backend_ids": [each.backend_id for each in registrations],
        "roles": [each.role for each in registrations],
        "modes": [str(each.mode or SyncMode.ASYNCHRONOUS) for each in registrations],
        "orderings": [each.ordering for each in registrations],
        "tenant_ids": [_literal(each.tenant_ids) for each in registrations],
        "resource_types": [_literal(each.resource_types) for each in registrations],
        "shadows": [each.shadow for each in registrations],
        "revive": revive,
    }
    connection.execute(text(REGISTER.on(schema)), parameters)


def register_known(connection: Connection, schema: str, registrations: Sequence[Registration]) -> None:
    """As `register`, for a relay that starts: its configuration may be older than the removal of a secondary."""
    register(connection, schema, registrations, revive=False)


def _literal(names: Sequence[str] | None) -> str | None:
    """An array literal: arrays of unequal length cannot be unnested side by side, their literals can."""
    if names is None:
        return None
    quoted = (name.replace("\\", "\\\\").replace('"', '\\"') for name in names)
    return "{" + ",".join(f'"{name}"' for name in quoted) + "}"


def check_together(registrations: Sequence[Registration], config: SyncConfig) -> None:
    """Raise `SettingsError` for secondaries that cannot be one manager's, or contradict its settings."""
    names = [each.backend_id for each in registrations]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError("secondaries", f"{name!r} is there twice")
    # A relay that is no longer waited for may still be writing for as long as its batch was given.
    longest = config.attempt_deadline + config.lease
    for each in registrations:
        if isinstance(each.secondary, Forgetful) and each.secondary.tombstones_for < longest:
            field = f"secondaries.{each.backend_id}.tombstones_for"
            raise SettingsError(field, f"must not be below attempt_deadline and lease together ({longest})")
