"""Stands: for each adapter a real server, a line to it that can fail, and a way round that line to look."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import MemorySecondary, ResourceStorageSecondary
from outbox.secondaries.base import Secondary
from outbox.secondaries.opensearch import ElasticsearchSecondary, OpenSearchSecondary
from outbox.secondaries.sql import SqlSecondary
from outbox.secondaries.valkey import ValkeySecondary
from outbox.testing.line import Line
from outbox.testing.postgres import PostgresServer
from tests.conftest import new_database
from tests.misbehaviour.fronts import HttpFront, RespFront
from tests.misbehaviour.stores import RemoteStorage, storage_server

# What resolves to 127.0.0.1 in these tests, as long as names resolve.
HOST = "secondary.invalid"


@dataclass
class Terms:
    """How a stand is to be made."""

    request: pytest.FixtureRequest
    path: Path
    timeout: timedelta
    front: bool
    named: bool

    def of_server(self, fixture: str) -> Any:
        return self.request.getfixturevalue(fixture)

    @property
    def host(self) -> str:
        return HOST if self.named else "127.0.0.1"


@dataclass
class Stand:
    """One adapter before its server. `says` is what a client says when it writes; `hands` reach the server directly."""

    secondary: Secondary
    direct: Secondary
    line: Line | None = None
    says: bytes = b""
    front: Any = None
    hands: dict[str, Any] = field(default_factory=dict)

    def forget_names(self) -> None:
        """The clients of search servers remember addresses for a while."""
        client = self.hands.get("client")
        if client is not None:
            transport = client().transport
            known = getattr(transport, "connection_pool", None)
            for connection in known.connections if known else transport.node_pool.all():
                connection.session.connector.clear_dns_cache()


Made = Callable[[Terms], AbstractAsyncContextManager[Stand]]


@asynccontextmanager
async def closing(*closed: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for each in closed:
            await (each.dispose() if isinstance(each, AsyncEngine) else each.aclose())


@asynccontextmanager
async def memory(terms: Terms) -> AsyncIterator[Stand]:
    secondary = MemorySecondary("copy")
    yield Stand(secondary, secondary)


@asynccontextmanager
async def postgres(terms: Terms) -> AsyncIterator[Stand]:
    """By a role of its own, as a superuser is refused nothing."""
    server: PostgresServer = terms.of_server("postgres")
    role = f"app_{uuid4().hex[:12]}"
    with new_database(server) as name:
        url = sa.make_url(server.dsn(name))
        admin = create_async_engine(url, isolation_level="AUTOCOMMIT")
        async with admin.connect() as connection:
            await connection.execute(sa.text(f"create role {role} login password 'x'"))
            await connection.execute(sa.text(f"grant create, usage on schema public to {role}"))
        async with Line(url.port or 5432) as line:
            through = url.set(host=terms.host, port=line.port, username=role, password="x")
            secondary = SqlSecondary("copy", through, timeout=terms.timeout)
            async with closing(secondary, direct := SqlSecondary("direct", url), admin):
                try:
                    yield Stand(secondary, direct, line, b"COMMIT", hands={"admin": admin, "role": role})
                finally:
                    await secondary.aclose()
                    async with admin.connect() as connection:
                        await connection.execute(sa.text(f"drop owned by {role} cascade"))
                        await connection.execute(sa.text(f"drop role {role}"))


@asynccontextmanager
async def mariadb(terms: Terms) -> AsyncIterator[Stand]:
    """By an account of its own, as root is refused nothing."""
    url = sa.make_url(terms.of_server("mariadb_url"))
    role = f"a{uuid4().hex[:12]}"
    table = f"copy_{role}"
    admin = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.execute(sa.text(f"create user {role} identified by 'x'"))
        await connection.execute(sa.text(f"grant all on outbox.* to {role}"))
    async with Line(url.port or 3306) as line:
        through = url.set(host=terms.host, port=line.port, username=role, password="x")
        secondary = SqlSecondary("copy", through, table, timeout=terms.timeout)
        async with closing(direct := SqlSecondary("direct", url, table), admin):
            try:
                yield Stand(secondary, direct, line, b"COMMIT", hands={"admin": admin, "role": role, "table": table})
            finally:
                await secondary.aclose()
                async with admin.connect() as connection:
                    await connection.execute(sa.text(f"drop table if exists {table}"))
                    await connection.execute(sa.text(f"drop user {role}"))


@asynccontextmanager
async def sqlite(terms: Terms) -> AsyncIterator[Stand]:
    url = f"sqlite+aiosqlite:///{terms.path}/copy.db"
    # One writer at a time, who does not wait long for another hand's lock.
    engine = create_async_engine(url, pool_size=1, max_overflow=0, connect_args={"timeout": 0.1})
    secondary = SqlSecondary("copy", engine, timeout=terms.timeout)
    async with closing(direct := SqlSecondary("direct", url), engine):
        yield Stand(secondary, direct, hands={"engine": engine, "file": terms.path / "copy.db"})


def _search(kind: type[OpenSearchSecondary | ElasticsearchSecondary]) -> Made:
    @asynccontextmanager
    async def search(terms: Terms) -> AsyncIterator[Stand]:
        url = terms.of_server("opensearch_url")
        prefix = f"t{uuid4().hex[:12]}"
        async with HttpFront(url) as front, Line(front.port if terms.front else urlsplit(url).port) as line:
            through = f"http://{terms.host}:{line.port}"
            secondary = kind("copy", through, prefix=prefix, timeout=terms.timeout)
            async with closing(direct := OpenSearchSecondary("direct", url, prefix=prefix)):
                try:
                    yield Stand(secondary, direct, line, b"/_bulk", front, {"client": lambda: secondary._http._client})
                finally:
                    await secondary.aclose()

    return search


@asynccontextmanager
async def valkey(terms: Terms) -> AsyncIterator[Stand]:
    url = terms.of_server("valkey_url")
    prefix = uuid4().hex
    async with RespFront(urlsplit(url).port) as front, Line(front.port if terms.front else urlsplit(url).port) as line:
        secondary = ValkeySecondary("copy", f"redis://{terms.host}:{line.port}/0", prefix, timeout=terms.timeout)
        async with closing(direct := ValkeySecondary("direct", url, prefix)):
            try:
                yield Stand(secondary, direct, line, b"EVALSHA", front, {"url": url, "prefix": prefix})
            finally:
                await secondary.aclose()


@asynccontextmanager
async def storage(terms: Terms) -> AsyncIterator[Stand]:
    async with storage_server(terms.path / "notes.db") as (server, port), Line(port) as line:
        through = RemoteStorage(line.port, terms.timeout.total_seconds(), terms.host)
        secondary, direct = (
            ResourceStorageSecondary(through, "copy"),
            ResourceStorageSecondary(RemoteStorage(port, 30), "direct"),
        )
        yield Stand(secondary, direct, line, b'["', hands={"server": server})


STANDS: dict[str, Made] = {
    "memory": memory,
    "postgres": postgres,
    "mariadb": mariadb,
    "sqlite": sqlite,
    "opensearch": _search(OpenSearchSecondary),
    "elasticsearch": _search(ElasticsearchSecondary),
    "valkey": valkey,
    "storage": storage,
}
# What starts a server does so before anything is counted.
SERVERS = {
    "mariadb": "mariadb_url",
    "opensearch": "opensearch_url",
    "elasticsearch": "opensearch_url",
    "valkey": "valkey_url",
}
