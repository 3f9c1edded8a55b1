"""Generations: indices filled beside those that are searched, and the one step from the old to the new.

An index is named `all.` and its alias; or `all.`, a letter, a dot and its alias: the letter tells generations apart.
While a generation is filled its indices have an alias of their own, with the letter; it goes when the old ones go.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable
from typing import Any

import msgspec

from outbox.errors import Unavailable
from outbox.secondaries.opensearch_answer import raise_refused
from outbox.secondaries.opensearch_documents import LIVE
from outbox.secondaries.opensearch_http import Request, SearchHttp
from outbox.secondaries.opensearch_reads import decoded

__all__ = ["Generation", "index_without_alias"]

_GENERATIONS = tuple(f"{letter}." for letter in string.ascii_lowercase)

# Of each alias its indices by generation, and of each of those the aliases it has.
_Layout = dict[str, dict[str, frozenset[str]]]


class _Named(msgspec.Struct):
    aliases: dict[str, Any]


class Generation:
    """The indices that are filled beside those of `prefix`; `prefix` itself is where they end up."""

    def __init__(self, http: SearchHttp, prefix: str, mark: str) -> None:
        self._http = http
        self._prefix = prefix
        self._mark = mark

    @property
    def prefix(self) -> str:
        """What the names of its aliases begin with."""
        return f"{self._mark}{self._prefix}"

    @classmethod
    async def beside(cls, http: SearchHttp, prefix: str) -> Generation:
        """Return the generation that was begun and not ended, else a new one. Raises `Unavailable`."""
        layout = await _layout(http, prefix)
        for mark in _GENERATIONS:
            if any(f"{mark}{alias}" in named for alias, named in _each(layout, mark)):
                return cls(http, prefix, mark)
        used = {mark for indices in layout.values() for mark in indices}
        return cls(http, prefix, next(mark for mark in _GENERATIONS if mark not in used))

    async def switched(self) -> bool:
        """Whether what it holds is what is searched already. Raises `Unavailable`."""
        return any(alias in named for alias, named in _each(await _layout(self._http, self._prefix), self._mark))

    async def switch(self, aliases: Iterable[str]) -> None:
        """Let these aliases lead to its indices, all of them at one moment. Raises `Unavailable`."""
        layout, wanted = await _layout(self._http, self._prefix), {*aliases}
        actions: list[dict[str, Any]] = []
        for alias, indices in layout.items():
            if alias in wanted and self._mark in indices:
                old = [mark for mark, named in indices.items() if mark != self._mark and alias in named]
                actions += [{"remove": {"index": f"all.{mark}{alias}", "alias": alias}} for mark in old]
                actions.append({"add": {"index": f"all.{self._mark}{alias}", "alias": alias, "filter": LIVE}})
        await self._change(actions)

    async def drop_old(self) -> None:
        """Delete what it took the place of, and of itself what took no place. Raises `Unavailable`."""
        actions: list[dict[str, Any]] = []
        for alias, indices in (await _layout(self._http, self._prefix)).items():
            mine = f"all.{self._mark}{alias}"
            if alias in indices.get(self._mark, frozenset()):
                old = [mark for mark in indices if mark != self._mark]
                actions += [{"remove_index": {"index": f"all.{mark}{alias}"}} for mark in old]
                if f"{self._mark}{alias}" in indices[self._mark]:
                    actions.append({"remove": {"index": mine, "alias": f"{self._mark}{alias}"}})
            elif self._mark in indices:
                actions.append({"remove_index": {"index": mine}})
        await self._change(actions)

    async def _change(self, actions: list[dict[str, Any]]) -> None:
        if actions:
            body = json.dumps({"actions": actions}).encode()
            raise_refused(await self._http.send(Request("POST", "/_aliases", body)))


async def index_without_alias(http: SearchHttp, prefix: str, alias: str) -> str | None:
    """Return the index that may have lost this alias, None when none is left. Raises `Unavailable` when several are.

    What is still being filled has an alias of its own, and is not it.
    """
    indices = (await _layout(http, prefix)).get(alias, {})
    left = [mark for mark, named in indices.items() if not mark or f"{mark}{alias}" not in named]
    if len(left) > 1:
        # The wrong one would let old writes pass that the right one refuses.
        raise Unavailable("alias_lost", f"nothing tells which of several indices {alias} led to")
    return f"all.{left[0]}{alias}" if left else None


def _each(layout: _Layout, mark: str) -> Iterable[tuple[str, frozenset[str]]]:
    return ((alias, indices[mark]) for alias, indices in layout.items() if mark in indices)


async def _layout(http: SearchHttp, prefix: str) -> _Layout:
    answer = await http.send(Request("GET", "/all.*/_alias"))
    raise_refused(answer)
    found: _Layout = {}
    # Neither a prefix nor a generation's mark is part of another: there is no dot in one, and no more in the other.
    ours = re.compile(rf"all\.([a-z]\.)?({re.escape(prefix)}-[a-z0-9_.]+)")
    for index, named in decoded(answer, dict[str, _Named]).items():
        if match := ours.fullmatch(index):
            found.setdefault(match[2], {})[match[1] or ""] = frozenset(named.aliases)
    return found
