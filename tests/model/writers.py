"""What writers do: short transactions, and one that stays open with its savepoints while others come and go."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.comparing import said
from tests.model.model import Event, Key
from tests.model.world import KEYS, TENANTS, Open, World
from tests.model.writing import ByHand, Captured

A_CHANGE = st.tuples(st.sampled_from(KEYS), st.sampled_from(["put", "put", "put", "remove"]))
CHANGES = st.lists(A_CHANGE, min_size=1, max_size=4)


class Writers(World):
    """The rules of writers."""

    @rule(changes=CHANGES)
    def write(self, changes: list[tuple[Key, str]]) -> None:
        """One transaction, begun and committed while the slow one may be open."""
        self.write_at_once(changes, by_hand=False)

    @rule(changes=CHANGES)
    def write_by_hand(self, changes: list[tuple[Key, str]]) -> None:
        self.write_at_once(changes, by_hand=True)

    @precondition(lambda self: self.slow is None)
    @rule(by_hand=st.booleans())
    def begin(self, by_hand: bool) -> None:
        self.slow = self.opened(by_hand)

    @precondition(lambda self: self.slow)
    @rule(change=A_CHANGE)
    def write_slowly(self, change: tuple[Key, str]) -> None:
        self.touched.add(change[0])
        self.change(self.slow, *change)

    @precondition(lambda self: self.slow)
    @rule()
    def savepoint(self) -> None:
        self.run(self.slow.writing.savepoint())
        self.slow.written.append([])

    @precondition(lambda self: self.slow and len(self.slow.written) > 1)
    @rule()
    def roll_back_savepoint(self) -> None:
        self.run(self.slow.writing.undo())
        self.slow.written.pop()

    @precondition(lambda self: self.slow)
    @rule(commits=st.sampled_from([True, True, False]))
    def end(self, commits: bool) -> None:
        slow, self.slow, self.touched = self.slow, None, set()
        if commits:
            self.commit(slow)
        else:
            self.undone += self.run(slow.writing.rollback())

    def write_at_once(self, changes: list[tuple[Key, str]], *, by_hand: bool) -> None:
        opened = self.opened(by_hand)
        for key, what in changes:
            # What the slow one has locked would be waited for.
            if key not in self.touched:
                self.change(opened, key, what)
        self.commit(opened)

    def opened(self, by_hand: bool) -> Open:
        opened = Open(ByHand(self.ground.engine) if by_hand else Captured(self.manager))
        self.run(opened.writing.begin())
        return opened

    def change(self, opened: Open, key: Key, what: str) -> None:
        rows = self.model.rows | {event.key: event.content for event in opened.events}
        content = None if what == "remove" else said(str(self.contents))
        self.contents += 1
        if content is None and rows.get(key) is None:
            return
        writing = opened.writing
        self.run(writing.remove(key) if content is None else writing.put(key, content))
        opened.written[-1].append(Event(key, content, self.model.owed_to(key)))

    def commit(self, opened: Open) -> None:
        token = self.run(opened.writing.commit())
        self.undone += getattr(opened.writing, "undone", [])
        positions = token.positions if token else []
        for position, event in zip(positions, opened.events, strict=True):
            self.committed(position, event)
            assert token is not None
            owed_to = {name for name in TENANTS if any(position in each.positions for each in token.owed_to(name))}
            assert owed_to == event.owed_to
        self.tokens += [token] if token else []
