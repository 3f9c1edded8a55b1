"""Fronts: programmable servers that pass on to a real one, except what a test tells them to answer otherwise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from tests.waiting import eventually

Doing = Callable[[web.Request, Callable[[], Awaitable[web.Response]]], Awaitable[web.StreamResponse | None]]
Item = dict[str, Any]
_GONE = (ConnectionError, EOFError, OSError)


class HttpFront:
    """A server of HTTP. `fault` gets the request and a function that asks the real server; None resets."""

    def __init__(self, url: str) -> None:
        self.fault: Doing | None = None
        self.elsewhere = 0
        self._upstream = url
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/elsewhere", self._on_elsewhere)
        app.router.add_route("*", "/{rest:.*}", self._on_request)
        self._runner = web.AppRunner(app, shutdown_timeout=1)

    @property
    def port(self) -> int:
        return int(self._runner.addresses[0][1])

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _on_elsewhere(self, request: web.Request) -> web.Response:
        self.elsewhere += 1
        return web.json_response({})

    async def _on_request(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()

        async def passed() -> web.Response:
            headers = {"content-type": request.headers.get("content-type", ""), "accept-encoding": "identity"}
            async with self._session.request(
                request.method, self._upstream + request.path_qs, data=body or None, headers=headers
            ) as found:
                return web.Response(status=found.status, body=await found.read(), content_type="application/json")

        answer = await passed() if self.fault is None else await self.fault(request, passed)
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return answer


def bulk_items(answer: web.Response) -> list[Item]:
    """The items of a real answer."""
    assert isinstance(answer.body, bytes)
    return list(json.loads(answer.body)["items"])


class RespFront:
    """A server of RESP. `fault` gets a command and may give the answer in the real server's place."""

    def __init__(self, upstream: int | None) -> None:
        self.fault: Callable[[list[bytes]], bytes | None] | None = None
        self._upstream = upstream
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**24)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()
        await eventually(lambda: not self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        up_writer = None
        try:
            with suppress(*_GONE):
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream, limit=2**24)
                while True:
                    raw, words = await _command(reader)
                    answer = self.fault(words) if self.fault is not None else None
                    if answer is None:
                        up_writer.write(raw)
                        answer = await _answer(up_reader)
                    writer.write(answer)
                    await writer.drain()
        finally:
            self._writers.discard(writer)
            writer.close()
            if up_writer is not None:
                up_writer.close()


async def _command(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    raw = await reader.readuntil(b"\r\n")
    words = []
    for _ in range(int(raw[1:])):
        head = await reader.readuntil(b"\r\n")
        word = await reader.readexactly(int(head[1:]) + 2)
        raw += head + word
        words.append(word[:-2])
    return raw, words


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """Read one whole answer, whatever is nested in it."""
    head = await reader.readuntil(b"\r\n")
    kind, rest = head[:1], head[1:-2]
    if kind in b"$=!" and int(rest) >= 0:
        return head + await reader.readexactly(int(rest) + 2)
    if kind in b"*~>%" and int(rest) > 0:
        parts = int(rest) * (2 if kind == b"%" else 1)
        return head + b"".join([await _answer(reader) for _ in range(parts)])
    return head
