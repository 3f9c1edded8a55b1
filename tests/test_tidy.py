"""The style guide as a test: sizes, names, docstrings, exports, SQL, logging, errors in `outbox/`.

Every rule stands beside samples it must refuse, so that none can quietly stop seeing.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FUNCTION_LINES, FILE_LINES = 50, 300
REFUSED_WORDS = re.compile("job|message|queue|worker|consumer|sink|target|replica|publish|dequeue", re.IGNORECASE)
REFUSED_MODULES = {"common", "helper", "helpers", "util", "utils"}
LOG_CALLS = {"debug", "info", "warning", "error", "exception", "critical", "log"}

# These patterns are spelt so that they do not find themselves.
_MARK = re.compile(r"\b(?:TOD[O]|FIXM[E]|X{3})\b|type:\s*ignor[e]")
_LOCAL_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home)\b(?!-)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Lower case needs a second key word, because "update of ..." is also English.
_SQL = re.compile(
    r"\s*(?:(?:SELECT|INSERT|UPDATE|DELETE|WITH)\b|(?i:select\b.+\bfrom\b|insert\s+into\b"
    r"|update\b.+\bset\b|delete\s+from\b|with\s.+\bas\s+(?:materialized\s+)?\())",
    re.DOTALL,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Found = Iterator[tuple[int, str]]


class Source(NamedTuple):
    """A Python file: its path from the root of the tree, its text, its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, path: str, text: str) -> Source:
        return cls(Path(path), text, ast.parse(text, path))


Rule = Callable[[Source], Found]
REFUSED: list[tuple[Rule, str]] = []


def refuses(*samples: str) -> Callable[[Rule], Rule]:
    """Register a rule with samples it must object to."""

    def register(rule: Rule) -> Rule:
        REFUSED.extend((rule, sample) for sample in samples)
        return rule

    return register


@refuses("x = 1\n" * 301, "class C:\n  async def f():\n" + "    g()\n" * 50)
def sizes_are_kept(source: Source) -> Found:
    if (lines := len(source.text.splitlines())) > FILE_LINES:
        yield lines, f"the file has {lines} lines, the limit is {FILE_LINES}"
    for node in ast.walk(source.tree):
        if isinstance(node, Function) and (lines := _lines(node)) > FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {lines} lines, the limit is {FUNCTION_LINES}"


def _lines(function: Function) -> int:
    """Count the lines of a function, its docstring left out."""
    nodes = [function, function.body[0]] if ast.get_docstring(function) else [function]
    whole, *docstring = [(node.end_lineno or 0) - node.lineno + 1 for node in nodes]
    return whole - sum(docstring)


@refuses("def drain_jobs(): ...", "class MessageBox: ...", "worker_id = 1", "lambda jobId: 1")
@refuses("def f(*, a_queue): ...", "self.sinks = []", "for target in x: ...", "import a as replica")
@refuses("with f() as publisher: ...", "try: f()\nexcept E as dequeued: ...", "consumer: int")
def names_are_ours(source: Source) -> Found:
    module = source.path.with_suffix("").as_posix().removesuffix("/__init__").rpartition("/")[2]
    names = [(1, module), *chain.from_iterable(map(_defined, ast.walk(source.tree)))]
    for line, name in names:
        for word in _WORD.findall(name):
            if REFUSED_WORDS.match(word):
                yield line, f"{name!r} says {word!r}; the design has another word for it"
    if module in REFUSED_MODULES:
        yield 1, f"{module!r} does not say what is in the module"


def _defined(node: ast.AST) -> Found:
    """Yield the names a node brings into being; imported names are not ours."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield node.lineno, name
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            yield node.lineno, name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield node.lineno, name
        case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)) | ast.arg(arg=name):
            yield node.lineno, name


@refuses("x = 1  # TO" + "DO later", "# FIX" + "ME", '"""XX' + 'X"""', "x  # type" + ": ignore[x]")
def no_mark_is_left(source: Source) -> Found:
    yield from _matches(_MARK, source.text)


def _matches(pattern: re.Pattern[str], text: str) -> Found:
    for number, line in enumerate(text.splitlines(), 1):
        if match := pattern.search(line):
            yield number, f"holds {match[0]!r}"


@refuses("x = 1", '"""M."""\ndef f(): ...', '"""M."""\nif x:\n    async def f(): ...')
@refuses('"""M."""\nclass C: ...', '"""M."""\nclass C:\n    """C."""\n    def m(self): ...')
def public_names_have_docstrings(source: Source) -> Found:
    if any(re.match("_(?!_init__)", part) for part in source.path.parts):
        return
    if not ast.get_docstring(source.tree):
        yield 1, "the module has no docstring"
    for node in _public(source.tree):
        if not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def _public(scope: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for node in _statements(scope):
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            # Of these, the getter or the implementation carries the docstring.
            decorators = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
            if not decorators & {"setter", "deleter", "overload"}:
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def _statements(scope: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a scope, those under `if` and `try` too."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _statements(node)


@refuses("def f(): ...", "class C: ...", "LIMIT = 1", "x: int = 1", "a, b = c\n__all__ = ['a']")
@refuses("__all__ = ['gone']", "if x:\n    y = 1", "from a import b\n__all__ = ['b']")
def exports_are_the_public_names(source: Source) -> Found:
    line, exported = 1, set[str]()
    public: dict[str, int] = {}
    for node in _statements(source.tree):
        for name in _bound(node, reexports=source.path.name == "__init__.py"):
            if name == "__all__" and isinstance(node, ast.Assign):
                line, exported = node.lineno, set(ast.literal_eval(node.value))
            elif not name.startswith("_"):
                public.setdefault(name, node.lineno)
    yield from ((public[name], f"{name} is not in __all__") for name in public.keys() - exported)
    yield from ((line, f"{name} is not defined here") for name in exported - public.keys())


def _bound(node: ast.stmt, *, reexports: bool) -> Iterator[str]:
    """Yield the names a statement of a module defines; in a package, imports from ours count."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=bound):
            names = chain.from_iterable(map(ast.walk, bound))
            yield from (name for each in names for _, name in _defined(each))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case ast.ImportFrom(module=str(module)) if reexports and module.startswith("outbox"):
            yield from (alias.asname or alias.name for alias in node.names)


@refuses('f"SELECT {x}"', 'f"""\n  select a from {x}"""', '"insert into t values (%s)" % x')
@refuses('"DELETE FROM {}".format(x)', 'f"update {t} set a = 1"', '"UPDATE t SET a = " + x')
@refuses('f"with a as (select {x}) select 1"', 'import logging\nlog.info(f"{x}")')
@refuses('from logging import a\nx.error("%s" % x)', 'import logging\nx.log(3, "{}".format(x))')
def sql_and_log_texts_are_constant(source: Source) -> Found:
    logs = re.search(r"^\s*(?:import|from) logging\b", source.text, re.MULTILINE)
    for node in ast.walk(source.tree):
        if _SQL.match(_composed(node) or ""):
            yield getattr(node, "lineno", 1), "SQL is put together here; make it a constant"
        match node:
            case ast.Call(func=ast.Attribute(attr=name), args=args) if logs and name in LOG_CALLS:
                if any(_composed(each) is not None for each in args):
                    yield node.lineno, "a log call composes its text; pass the values"


def _composed(node: ast.AST) -> str | None:
    """Return the fixed part of a text that is being put together, None when it is not."""
    match node:
        case ast.JoinedStr(values=parts):
            return "".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in parts)
        case ast.BinOp(left=ast.Constant(value=str(text)), op=ast.Mod() | ast.Add()):
            return text
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="format")):
            return text
    return None


@refuses("self._engine.execution_options(isolation_level=x)")
@refuses("print(1)", "try: f()\nexcept: ...", "try: f()\nexcept (OSError, BaseException): ...")
def powers_stay_in_their_place(source: Source) -> Found:
    place = source.path.parts[1]
    for node in ast.walk(source.tree):
        match node:
            case ast.Name(id="print") if not place.startswith(("cli", "demo")):
                yield node.lineno, "prints; only the command line and the demo talk to people"
            case ast.Call(func=ast.Attribute(value=given, attr="execution_options")):
                if ast.unparse(given).endswith("engine"):
                    yield node.lineno, "an engine's options give way to those it was made with; use outbox.level"
            case ast.ExceptHandler(type=caught) if place != "dispatch.py":
                if caught is None or "BaseException" in ast.unparse(caught):
                    yield node.lineno, "catches everything, cancellation too; only dispatch may"


@cache
def _sources() -> list[Source]:
    paths = sorted((ROOT / "outbox").rglob("*.py"))
    return [Source.of(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in paths]


def _texts() -> Iterator[tuple[Path, str]]:
    """Yield every text file that git would keep, whether or not git is there to ask."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
    folders = [ROOT]
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
                continue
            if path.is_dir():
                folders.append(path)
            elif b"\0" not in (raw := path.read_bytes()):
                yield path.relative_to(ROOT), raw.decode(errors="replace")


def _none(violations: Iterator[tuple[Path, int, str]]) -> None:
    if found := [f"{path}:{line}: {problem}" for path, line, problem in sorted(violations)]:
        pytest.fail("\n".join([f"{len(found)} found:", *found]), pytrace=False)


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _ in REFUSED), ids=lambda rule: rule.__name__)
def test_outbox(rule: Rule):
    _none((source.path, *found) for source in _sources() for found in rule(source))


def test_exports_are_sorted_as_ruff_sorts():
    options = ["--isolated", "--ignore-noqa", "--no-cache", "--output-format=concise"]
    command = [sys.executable, "-m", "ruff", "check", "--select=RUF022", *options, "outbox"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)


def test_no_file_names_a_place_on_one_machine():
    _none((path, *found) for path, text in _texts() for found in _matches(_LOCAL_PATH, text))


@pytest.mark.parametrize("name", ["work", "root/x", "home/me"])
def test_a_place_on_one_machine_is_seen(name: str):
    assert all(_LOCAL_PATH.search(f"{before}/{name}") for before in ("", "cd ", '"', "PATH=", "a:"))
    assert not _LOCAL_PATH.search(f"x/{name} //{name} ./{name} ../{name} /{name.title()}")


@pytest.mark.parametrize(("rule", "sample"), REFUSED)
def test_each_rule_sees_what_it_refuses(rule: Rule, sample: str):
    assert list(rule(Source.of("outbox/planted.py", sample)))


CLEAN = '''"""A module."""
import asyncio, logging
from queue import Queue
__all__ = ["Kept"]
_log = logging.getLogger(__name__)
_CLAIM = "select 1 from t where a = :a" " and b = :b"
class Kept:
    """A class."""
    def _private(self): _log.info("%s %s", asyncio.Queue(), f"update of {network}".split())
    @property
    def size(self):
        """A getter."""
    @size.setter
    def size(self, value):
        try: raise ValueError(f"delete needs {network}")
        except Exception: ...
'''


def test_no_rule_objects_to_clean_code():
    clean = Source.of("outbox/planted.py", CLEAN)
    assert [(rule.__name__, *found) for rule, _ in REFUSED for found in rule(clean)] == []
