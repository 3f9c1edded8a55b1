"""One request to a search server through its client's own connections, the answer to the letter.

The clients parse answers into binary floats, retry by themselves, follow redirects and log bodies. So requests go to a
connection of the client, below all that, with its addresses, TLS and credentials.
"""

from __future__ import annotations

import io
import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import aiohttp
import msgspec

from outbox.errors import Unavailable
from outbox.secondaries.opensearch_answer import Answer, retry_after_of

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch
    from opensearchpy import AsyncOpenSearch

__all__ = ["NDJSON", "SAME_COPIES", "ElasticsearchHttp", "OpenSearchHttp", "Request", "SearchHttp"]

NDJSON = "application/x-ndjson"
# Any word of one's own keeps all pages on the same copies of the shards.
SAME_COPIES = "outbox-scan"


class Request(msgspec.Struct, frozen=True):
    """What to ask a search server; the path holds nothing that needs quoting."""

    method: str
    path: str
    body: bytes | None = None
    params: Mapping[str, str] = {}
    media: str = "application/json"


_HELLO = Request("GET", "/")


class SearchHttp(ABC):
    """The way to one search server.

    A client made here from an address is closed here; one handed in is its owner's.
    """

    #: Which copies of the shards a search asks.
    preference = SAME_COPIES

    def __init__(self, client: Any, timeout: timedelta, *, owned: bool) -> None:
        self._client = client
        self._owned = owned
        self._seconds = timeout.total_seconds()

    async def send(self, request: Request) -> Answer:
        """Return the answer whatever its status. Raises `Unavailable` when none came within the timeout."""
        with _no_bodies_logged():
            connection = await self._pick()
            if getattr(connection, "session", connection) is None:
                # Redirects are forbidden on the session, which a connection makes for its first request.
                await self._ask(connection, _HELLO)
            _refuse_redirects(connection)
            return await self._ask(connection, request)

    async def aclose(self) -> None:
        """Close the client if it was made here; calling it twice is harmless."""
        if self._owned:
            await self._client.close()

    @abstractmethod
    async def _pick(self) -> Any:
        """Return one of the client's connections."""

    @abstractmethod
    async def _ask(self, connection: Any, request: Request) -> Answer:
        """Send one request and return its answer. Raises `Unavailable`."""


class OpenSearchHttp(SearchHttp):
    """Requests through opensearch-py."""

    # Where replicas copy segments, a refresh makes only the primaries new.
    preference = "_primary"

    def __init__(self, client_or_url: AsyncOpenSearch | str, timeout: timedelta) -> None:
        import opensearchpy  # noqa: PLC0415 - an extra: only its users have it

        if isinstance(client_or_url, str):
            client = opensearchpy.AsyncOpenSearch(hosts=[client_or_url])
            super().__init__(client, timeout, owned=True)
        else:
            super().__init__(client_or_url, timeout, owned=False)
        self._unreached = opensearchpy.ConnectionError

    async def _pick(self) -> Any:
        # Entering makes the connections, in the running loop, and only the first time.
        await self._client.__aenter__()
        return self._client.transport.get_connection()

    async def _ask(self, connection: Any, request: Request) -> Answer:
        pool = self._client.transport.connection_pool
        try:
            status, headers, text = await connection.perform_request(
                request.method,
                request.path,
                params=request.params,
                body=_sent(request),
                timeout=self._seconds,
                ignore=range(300, 1000),
                headers=_media_headers(request),
            )
        except self._unreached as error:
            pool.mark_dead(connection)
            raise _unreachable(error.info) from error
        pool.mark_live(connection)
        return Answer(status, text.encode(errors="surrogatepass"), retry_after_of(headers))


class ElasticsearchHttp(SearchHttp):
    """Requests through elasticsearch-py."""

    def __init__(self, client_or_url: AsyncElasticsearch | str, timeout: timedelta) -> None:
        import elastic_transport  # noqa: PLC0415 - an extra: only its users have it
        import elasticsearch  # noqa: PLC0415 - an extra: only its users have it

        if isinstance(client_or_url, str):
            client = elasticsearch.AsyncElasticsearch(client_or_url)
            super().__init__(client, timeout, owned=True)
        else:
            super().__init__(client_or_url, timeout, owned=False)
        self._unreached = elastic_transport.TransportError

    async def _pick(self) -> Any:
        return self._client.transport.node_pool.get()

    async def _ask(self, connection: Any, request: Request) -> Answer:
        pool = self._client.transport.node_pool
        query = f"?{urlencode(request.params)}" if request.params else ""
        try:
            answer = await connection.perform_request(
                request.method,
                request.path + query,
                body=_sent(request),
                # The client keeps its credentials in `_headers` and offers no other way to them.
                headers={**self._client._headers, **_media_headers(request)},  # noqa: SLF001
                request_timeout=self._seconds,
            )
        except self._unreached as error:
            pool.mark_dead(connection)
            raise _unreachable(next(iter(error.errors), None)) from error
        pool.mark_live(connection)
        return Answer(answer.meta.status, answer.body, retry_after_of(answer.meta.headers))


class _Body(bytes):
    """The bytes of a request as the clients know them, sent piece by piece."""

    __slots__ = ()


@aiohttp.payload_type(_Body)
class _Pieces(aiohttp.BytesIOPayload):
    # Plain bytes go to the socket in one write, however large, and the event loop waits for the copy.
    def __init__(self, value: _Body, *args: Any, **options: Any) -> None:
        super().__init__(io.BytesIO(value), *args, **options)


def _sent(request: Request) -> bytes | None:
    return None if request.body is None else _Body(request.body)


def _media_headers(request: Request) -> dict[str, str]:
    return {"content-type": request.media, "accept": "application/json"}


class _Redirected(aiohttp.ClientError):
    """Following a redirect could turn a write into a read, or carry it to another server."""


_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (_Redirected, "redirected"),
    (TimeoutError, "timeout"),
    (ssl.SSLError, "tls"),
    (aiohttp.ClientSSLError, "tls"),
    (aiohttp.ServerFingerprintMismatch, "tls"),
    (ConnectionRefusedError, "refused"),
    (aiohttp.ClientConnectorError, "unreachable"),
    (UnicodeDecodeError, "unreadable_answer"),
)


def _unreachable(cause: object) -> Unavailable:
    below = getattr(cause, "os_error", None)
    codes = [code for kind, code in _CAUSES if isinstance(cause, kind) or isinstance(below, kind)]
    code = codes[0] if codes else "connection_lost"
    return Unavailable(code, "no answer came from the search server")


async def _redirected(_session: Any, _context: SimpleNamespace, _seen: Any) -> None:
    raise _Redirected


_NO_REDIRECTS = aiohttp.TraceConfig()
_NO_REDIRECTS.on_request_redirect.append(_redirected)
_NO_REDIRECTS.freeze()


def _refuse_redirects(connection: Any) -> None:
    session = getattr(connection, "session", None)
    if isinstance(session, aiohttp.ClientSession) and _NO_REDIRECTS not in session.trace_configs:
        session.trace_configs.append(_NO_REDIRECTS)


_ours: ContextVar[bool] = ContextVar("_ours", default=False)


class _NoBodies(logging.Filter):
    """Keeps the clients from logging requests and answers of ours below a warning: they print whole bodies."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or not _ours.get()


_FILTER = _NoBodies()


@contextmanager
def _no_bodies_logged() -> Iterator[None]:
    for name in ("opensearch", "opensearchpy.trace", "elastic_transport.node"):
        logging.getLogger(name).addFilter(_FILTER)
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)
