"""Config: a whole manager from one TOML file, for relays that need no code of their own.

    dsn = "postgresql+asyncpg://relay:${RELAY_PASSWORD}@db/clinic"   # OUTBOX_DSN in the environment wins

    [outbox]                     # the fields of SyncConfig
    batch_size = 200

    [secondaries.search]         # the name in the registry
    type = "opensearch"          # or elasticsearch, valkey, sql, memory
    url = "https://search:9200"
    resource_types = ["Patient"]

Beside `type` and `url` a secondary takes the terms of `Registration` and the options of its adapter.
"""

from __future__ import annotations

import os
import re
import tomllib
from abc import abstractmethod
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.errors import SettingsError
from outbox.manager import SyncManager
from outbox.register import Registration
from outbox.secondaries.base import Secondary
from outbox.secondaries.memory import MemorySecondary
from outbox.settings import SyncConfig

__all__ = ["engine_on", "manager_from_config"]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_EXTRAS = {"mariadb": "mysql", "postgresql": "psycopg"}


def manager_from_config(path: str | Path) -> SyncManager:
    """Return the manager that a TOML file describes; nothing is connected.

    `${NAME}` in an address stands for a variable of the environment. Raises `SettingsError` that names the field: for
    what is unknown or out of range, for a variable that is not set, and for an adapter whose package is missing.
    """
    document = _read(Path(path))
    for name in document.keys() - {"dsn", "outbox", "secondaries"}:
        raise SettingsError(name, "is no part of a configuration; known are dsn, [outbox] and [secondaries.NAME]")
    dsn = os.environ.get("OUTBOX_DSN") or document.get("dsn")
    if not isinstance(dsn, str):
        raise SettingsError("dsn", "is missing; set it at the top of the file, or OUTBOX_DSN in the environment")
    secondaries = _table(document, "secondaries")
    registrations = [_registration(name, _table(secondaries, name, "secondaries.")) for name in secondaries]
    return SyncManager(engine_on(dsn), registrations, config=SyncConfig.load(path))


def engine_on(dsn: str) -> AsyncEngine:
    """Return an engine on a PostgreSQL address, whichever driver the address names.

    `postgresql://`, `postgres://` and libpq's `sslmode` are understood. Raises `SettingsError`, never showing the
    address: it may hold a password.
    """
    try:
        url = make_url(_filled("dsn", dsn.replace("postgres://", "postgresql://", 1)))
    except ArgumentError:
        raise SettingsError("dsn", "is not an address such as postgresql://user:password@host:5432/database") from None
    if url.get_backend_name() != "postgresql":
        raise SettingsError("dsn", f"must be of PostgreSQL, not of {url.get_backend_name()}")
    return create_async_engine(_for_asyncpg(url), hide_parameters=True, pool_pre_ping=True)


def _for_asyncpg(url: URL) -> URL:
    mode = url.query.get("sslmode")
    plain = url.set(drivername="postgresql+asyncpg").difference_update_query(["sslmode"])
    return plain if mode is None else plain.update_query_dict({"ssl": mode})


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError("config", f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError("config", f"{path} is not TOML: {error}") from None


def _table(document: Mapping[str, Any], name: str, within: str = "") -> dict[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{within}{name}", "must be a table")
    return table


def _filled(field: str, address: str) -> str:
    """Put variables of the environment where `${NAME}` stands."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise SettingsError(field, f"names ${{{found[1]}}}, which the environment does not have")
        return os.environ[found[1]]

    return _VARIABLE.sub(value, address)


class _Described(BaseModel):
    """What the table of any secondary may hold; each kind adds its adapter's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: str
    role: Literal["search", "graph", "terminology", "archive", "cache"] = "search"
    ordering: Literal["state", "log"] = "state"
    tenant_ids: list[str] | None = None
    resource_types: list[str] | None = None
    shadow: bool = False

    @abstractmethod
    def secondary(self, name: str) -> Secondary:
        """Return the adapter."""

    def options(self) -> dict[str, Any]:
        """Return what was set for the adapter; its own defaults stand for the rest."""
        ours = {*_Described.model_fields, "url"}
        return {field: getattr(self, field) for field in self.model_fields_set if field not in ours}

    def address(self, name: str) -> str:
        """Return the address, variables filled in."""
        return _filled(f"secondaries.{name}.url", str(getattr(self, "url", "")))


class _OpenSearch(_Described):
    url: str
    prefix: str = ""
    mapping: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    bulk_bytes: int = 0
    timeout: timedelta = timedelta()
    verify_content: bool = True

    def secondary(self, name: str) -> Secondary:
        from outbox.secondaries.opensearch import OpenSearchSecondary  # noqa: PLC0415 - an extra

        return OpenSearchSecondary(name, self.address(name), **self.options())


class _Elasticsearch(_OpenSearch):
    def secondary(self, name: str) -> Secondary:
        from outbox.secondaries.opensearch import ElasticsearchSecondary  # noqa: PLC0415 - an extra

        return ElasticsearchSecondary(name, self.address(name), **self.options())


class _Valkey(_Described):
    url: str
    prefix: str = ""
    tombstones_for: timedelta = timedelta()
    timeout: timedelta = timedelta()

    def secondary(self, name: str) -> Secondary:
        from outbox.secondaries.valkey import ValkeySecondary  # noqa: PLC0415 - an extra

        return ValkeySecondary(name, self.address(name), **self.options())


class _Sql(_Described):
    url: str
    table: str = ""
    database_schema: str | None = Field(default=None, alias="schema")
    timeout: timedelta = timedelta()

    def secondary(self, name: str) -> Secondary:
        from outbox.secondaries.sql import SqlSecondary  # noqa: PLC0415 - of all adapters only the memory one is small

        options = self.options()
        if "database_schema" in options:
            options["schema"] = options.pop("database_schema")
        return SqlSecondary(name, self.address(name), **options)


class _Memory(_Described):
    def secondary(self, name: str) -> Secondary:
        return MemorySecondary(name)


_KINDS: dict[str, type[_Described]] = {
    "elasticsearch": _Elasticsearch,
    "memory": _Memory,
    "opensearch": _OpenSearch,
    "sql": _Sql,
    "valkey": _Valkey,
}


def _registration(name: str, table: dict[str, Any]) -> Registration:
    kind = _KINDS.get(str(table.get("type")))
    if kind is None:
        raise SettingsError(f"secondaries.{name}.type", f"must be one of {', '.join(_KINDS)}")
    try:
        described = kind(**table)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        raise SettingsError(".".join(map(str, ("secondaries", name, *first["loc"]))), first["msg"]) from None
    return Registration(
        _built(name, described),
        role=described.role,
        ordering=described.ordering,
        tenant_ids=described.tenant_ids,
        resource_types=described.resource_types,
        shadow=described.shadow,
    )


def _built(name: str, described: _Described) -> Secondary:
    where = f"secondaries.{name}"
    try:
        return described.secondary(name)
    except ModuleNotFoundError as missing:
        extra = _extra(name, described)
        package = str(missing.name).partition(".")[0]
        hint = f"needs {package}, which is not installed: pip install 'outbox-sync[{extra}]'"
        raise SettingsError(f"{where}.type", hint) from None
    except ArgumentError:
        raise SettingsError(f"{where}.url", "is not an address that SQLAlchemy knows") from None
    except ValueError as error:
        raise SettingsError(f"{where}.url", f"is not an address of {described.type} ({type(error).__name__})") from None


def _extra(name: str, described: _Described) -> str:
    if not isinstance(described, _Sql):
        return described.type
    database = make_url(described.address(name)).get_backend_name()
    return _EXTRAS.get(database, database)
