"""Render story: what is known of one resource, and the evidence that one was erased, for people to read."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from outbox.forget import Evidence
from outbox.source import InPrimary
from outbox.story import Copy, Handed, Standing, Story, instant

__all__ = ["evidence_text", "story_text"]

_ATTEMPTS = 10
_DIGEST = 8
_OUTCOMES = ("applied", "stale", "superseded", "retried", "rejected", "released", "lost")


def story_text(story: Story) -> Group:
    """Return the story as sentences, with a table of the events and one of the attempts of each secondary."""
    return Group(*_story(story))


def evidence_text(evidence: Evidence) -> Group:
    """Return what was erased, where it was seen to be absent, and what is not proved."""
    return Group(*_evidence(evidence))


def _story(story: Story) -> Iterator[RenderableType]:
    yield Text(f"{story.resource_type}/{story.resource_id} of tenant {story.tenant_id}, at {instant(story.at)}", "bold")
    yield Text(_in_primary(story.primary, story.resource_type))
    if story.events:
        yield Text(f"Events kept: {story.events_kept:,}.")
        yield _events(story)
    else:
        yield Text("No event of it is kept.")
    if not story.secondaries:
        yield Text("No secondary is registered.")
    for standing in story.secondaries:
        yield Text("")
        yield from _standing(standing)


def _in_primary(primary: InPrimary, resource_type: str) -> str:
    if not primary.tracked:
        return f"What the primary holds cannot be said: {resource_type} is not tracked here."
    if not primary.present:
        return "The primary does not have it."
    version = "" if primary.version is None else f", version {primary.version}"
    if primary.digest is None:
        return f"The primary has it{version}, in a form that no event can carry: mend it there."
    return f"The primary has it{version}, digest {primary.digest[:_DIGEST]}."


def _events(story: Story) -> Table:
    table = _table("position", "operation", "version", "recorded", "correlation", "actor")
    for each in story.events:
        named = (each.version or "", instant(each.created_at), each.correlation_id or "", each.actor or "")
        table.add_row(str(each.position), each.operation, *named)
    return table


def _standing(standing: Standing) -> Iterator[RenderableType]:
    yield Text(f"{standing.backend_id} ({standing.status or 'not registered'}): {_copy(standing.copy)}", "bold")
    yield Text(f"  It waits for {standing.waits_for}.", "" if standing.in_step else "yellow")
    if standing.pending:
        yield Text(f"  Pending: {_positions(standing.pending)}.")
    if (held := standing.held) is not None:
        since = "" if held.first_failed_at is None else f", first failed {instant(held.first_failed_at)}"
        last = "" if held.last_failed_at is None else f", last {instant(held.last_failed_at)}"
        error = ": ".join(part for part in (held.error_code, held.error) if part)
        yield Text(f"  Held back, {held.state}, {held.attempts:,} attempts failed{since}{last}. {error}".rstrip())
    for note in standing.given_up:
        yield Text(f"  Event {note.position} was given up at {instant(note.discarded_at)}: {note.reason}")
    if standing.attempts:
        yield _attempts(standing.attempts)


def _copy(copy: Copy) -> str:
    holds = "does not have it" if copy.present is False else f"has it from position {copy.position}"
    if copy.present is None:
        return copy.unknown or "what it holds cannot be said"
    if copy.equal is None:
        return holds
    return f"{holds}, {'as' if copy.equal else 'unlike'} the primary"


def _attempts(attempts: tuple[Handed, ...]) -> Table:
    table = _table("attempt", "relay", "started", "ended", "its events", "outcomes of the batch", "error")
    for each in attempts[:_ATTEMPTS]:
        outcomes = ", ".join(f"{count:,} {name}" for name in _OUTCOMES if (count := getattr(each, name)))
        table.add_row(
            str(each.attempt_id),
            each.relay_id[:_DIGEST],
            instant(each.started_at),
            instant(each.finished_at) or f"lease until {instant(each.lease_until)}",
            _positions(each.positions),
            outcomes or ("" if each.finished_at else "in hand"),
            each.error_code or "",
        )
    if len(attempts) > _ATTEMPTS:
        table.caption = f"and {len(attempts) - _ATTEMPTS:,} before; --json has them"
    return table


def _positions(positions: tuple[int, ...]) -> str:
    return ", ".join(map(str, positions))


def _evidence(evidence: Evidence) -> Iterator[RenderableType]:
    scrubbed, name = (
        evidence.scrubbed,
        f"{evidence.resource_type}/{evidence.resource_id} of tenant {evidence.tenant_id}",
    )
    if evidence.dry_run:
        yield Text(f"{name} would be erased: {scrubbed.events:,} of its events hold content or headers.", "bold")
    else:
        yield Text(f"{name} was erased, by the delete at position {evidence.position}.", "bold")
        counts = f"{scrubbed.events:,} events, {scrubbed.failures:,} failures and {scrubbed.notes:,} notes"
        yield Text(f"Scrubbed {counts}, at {instant(evidence.at)}.")
    table = _table("secondary", "status", "delete", "absent", "seen at")
    for each in evidence.secondaries:
        absent = "cannot say" if each.absent is None else "yes" if each.absent else "no"
        colour = "green" if each.absent else "yellow" if evidence.dry_run else "red"
        seen = (Text(absent, colour), instant(each.verified_at))
        table.add_row(each.backend_id, each.status or "not registered", str(each.delete or ""), *seen)
    yield table
    if not evidence.dry_run:
        yield from (Text(f"Not proved: {sentence}", "red") for sentence in evidence.unproved)


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    return table
