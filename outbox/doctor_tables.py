"""Doctor, tables: whether ours are the ones this code needs, safe, looked after, and of one history."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from outbox.epoch import EPOCH
from outbox.errors import SchemaMissing
from outbox.finding import Case, Check, Finding, found_ok, found_unknown, found_warning, found_wrong
from outbox.migrate import check_schema
from outbox.statement import Statement
from outbox.status import lag_text

__all__ = [
    "BACKFILLS",
    "DOUBTED",
    "PERSISTENCE",
    "PRIVILEGES",
    "SEQUENCE",
    "TABLE_CHECKS",
    "TRIGGERS",
    "VACUUM",
    "tables_there",
]

_MANY_DEAD = 500_000
_UNMOVED = timedelta(minutes=15)

PRIVILEGES = Statement("""
select needed.work,
       array_agg(needed.privilege || ' on ' || needed.name order by needed.name, needed.privilege) as missing
from (values
    ('claim', 'outbox', 'select'), ('claim', 'outbox_delivery', 'select'), ('claim', 'outbox_delivery', 'delete'),
    ('claim', 'outbox_attempt', 'select'), ('claim', 'outbox_attempt', 'insert'), ('claim', 'outbox_hold', 'select'),
    ('claim', 'outbox_secondary', 'select'), ('claim', 'outbox_secondary', 'update'),
    ('settle', 'outbox_attempt', 'update'), ('settle', 'outbox_hold', 'insert'), ('settle', 'outbox_hold', 'update'),
    ('settle', 'outbox_hold', 'delete'),
    ('prune', 'outbox', 'delete'), ('prune', 'outbox_attempt', 'delete'), ('prune', 'outbox_discarded', 'delete')
) as needed (work, name, privilege)
where not has_table_privilege('{schema}.' || needed.name, needed.privilege)
group by needed.work
order by needed.work
""")

PERSISTENCE = Statement("""
select relation.relname
from pg_class as relation
where relation.relnamespace = (select relnamespace from pg_class where oid = cast('{schema}.outbox' as regclass))
  and relation.relkind = 'r' and relation.relpersistence <> 'p'
  and relation.relname in (
      'outbox', 'outbox_delivery', 'outbox_attempt', 'outbox_hold', 'outbox_discarded', 'outbox_secondary',
      'outbox_backfill', 'outbox_reconciliation')
order by relation.relname
""")

TRIGGERS = Statement("""
select current_setting('session_replication_role') as acting_as,
       array(
           select cast(cast(own.tgrelid as regclass) as text) || '.' || own.tgname
           from pg_trigger as own
           where not own.tgisinternal and own.tgenabled in ('D', 'R')
             and own.tgrelid in (
                 cast('{schema}.outbox' as regclass), cast('{schema}.outbox_delivery' as regclass),
                 cast('{schema}.outbox_attempt' as regclass), cast('{schema}.outbox_hold' as regclass),
                 cast('{schema}.outbox_secondary' as regclass))
           order by 1
       ) as disabled
""")

VACUUM = Statement("""
select current_setting('autovacuum') = 'on' and current_setting('track_counts') = 'on' as on_for_all,
       array_agg(relation.relname order by relation.relname) filter (where exists (
           select from unnest(relation.reloptions) as option (setting)
           where option.setting in ('autovacuum_enabled=false', 'autovacuum_enabled=off', 'autovacuum_enabled=0')
       )) as switched_off,
       max(coalesce(pg_stat_get_dead_tuples(relation.oid), 0)) as dead,
       (array_agg(relation.relname order by pg_stat_get_dead_tuples(relation.oid) desc))[1] as dirtiest
from pg_class as relation
where relation.oid in (
    cast('{schema}.outbox' as regclass), cast('{schema}.outbox_delivery' as regclass),
    cast('{schema}.outbox_attempt' as regclass), cast('{schema}.outbox_hold' as regclass),
    cast('{schema}.outbox_secondary' as regclass))
""")

SEQUENCE = Statement("""
select (select case when is_called then last_value else 0 end from {schema}.outbox_event_id_seq) as given,
       greatest(
           (select max(event_id) from {schema}.outbox), (select max(event_id) from {schema}.outbox_delivery), 0
       ) as highest,
       (
           select seqcache from pg_sequence where seqrelid = cast('{schema}.outbox_event_id_seq' as regclass)
       ) as in_advance,
       (select case when is_called then last_value else 0 end from {schema}.outbox_attempt_attempt_id_seq) as opened,
       (
           select coalesce(max(greatest(secondary.folded_through, (
               select max(attempt.attempt_id) from {schema}.outbox_attempt as attempt
               where attempt.backend_id = secondary.backend_id
           ))), 0)
           from {schema}.outbox_secondary as secondary
       ) as counted
""")

# A comparison of everything since, with nothing left that differs, is what ends a doubt.
DOUBTED = Statement("""
select secondary.backend_id, secondary.epoch,
       secondary.doubted_at is not null and not exists (
           select from {schema}.outbox_reconciliation as run
           where run.backend_id = secondary.backend_id and run.tenant_id is null and run.resource_type is null
             and run.started_at > secondary.doubted_at
             and run.missing + run.extra + run.stale + run.altered <= run.repaired
       ) as doubted
from {schema}.outbox_secondary as secondary
where secondary.status <> 'removed'
order by secondary.backend_id
""")

BACKFILLS = Statement("""
select backend_id, count(*) as scopes, statement_timestamp() - max(advanced_at) as age
from {schema}.outbox_backfill
where finished_at is null
group by backend_id
order by backend_id
""")


async def tables_there(case: Case) -> Sequence[Finding]:
    """Find out whether the tables are of this code's version."""
    try:
        await check_schema(case.engine, case.config.database_schema)
    except SchemaMissing as error:
        said, _, advice = str(error).partition(": ")
        return found_wrong("schema", said, advice)
    return found_ok("schema", f"the tables in schema {case.config.database_schema} are of this code's version")


async def _privileges(case: Case) -> Sequence[Finding]:
    if missing := await case.rows(PRIVILEGES):
        works = "; ".join(f"{work} ({', '.join(names)})" for work, names in missing)
        advice = "grant what is missing if relays use this role, or ask as the role they use"
        return found_wrong("privileges", f"this role may not {works}", advice)
    return found_ok("privileges", "this role may claim, settle and prune")


async def _persistence(case: Case) -> Sequence[Finding]:
    if names := [name for (name,) in await case.rows(PERSISTENCE)]:
        said = f"not logged: {', '.join(names)}; a crash empties them, and every secondary is to be reconciled then"
        return found_wrong("persistence", said, "; ".join(f"alter table {name} set logged" for name in names))
    return found_ok("persistence", "every table is logged")


async def _triggers(case: Case) -> Sequence[Finding]:
    acting_as, disabled = await case.row(TRIGGERS)
    if acting_as != "origin":
        said = f"session_replication_role is {acting_as}: triggers and foreign keys do not act in our sessions"
        return found_warning("triggers", said, "reset it for this role and database")
    if disabled:
        return found_warning("triggers", f"disabled: {', '.join(disabled)}", "enable them, or drop what is not needed")
    return found_ok("triggers", "none is disabled")


async def _vacuum(case: Case) -> Sequence[Finding]:
    on_for_all, switched_off, dead, dirtiest = await case.row(VACUUM)
    if not on_for_all or switched_off:
        where = ", ".join(switched_off) if on_for_all else "all tables"
        return found_warning("vacuum", f"autovacuum is off for {where}", "switch it on: deleted rows slow down all")
    if dead > _MANY_DEAD:
        said = f"{dirtiest} has {dead:,} dead rows"
        return found_warning(
            "vacuum", said, "see what holds back vacuum (transactions, prepared, slots), then vacuum it"
        )
    return found_ok("vacuum", f"autovacuum is on; the most dead rows are {dead:,}, in {dirtiest}")


async def _sequence(case: Case) -> Sequence[Finding]:
    given, highest, in_advance, opened, counted = await case.row(SEQUENCE)
    schema = case.config.database_schema
    if highest > given:
        said = f"the tables hold position {highest:,}, and the sequence has only given {given:,}: it was set back"
        return found_wrong("sequence", said, "outbox doctor --repair, then reconcile every secondary")
    if counted > opened:
        said = f"there was attempt {counted}, and the sequence of attempts has only given {opened}: it was set back"
        return found_wrong("sequence", said, f"select setval('{schema}.outbox_attempt_attempt_id_seq', {counted})")
    if in_advance > 1:
        # Floors, and a relay at rest, go by the highest one given: a session may still use what it has below.
        said = f"sessions are given {in_advance} positions in advance: what is written with them may be passed by"
        once = f"alter sequence {schema}.outbox_event_id_seq cache 1"
        advice = f"{once}; when all who write have connected anew, reconcile every secondary"
        return found_wrong("sequence", said, advice)
    return found_ok("sequence", f"positions are given up to {given:,}, and none is higher")


async def _history(case: Case) -> Sequence[Finding]:
    secondaries = await case.rows(DOUBTED)
    (current,) = await case.row(EPOCH)
    names = [name for name, epoch, doubted in secondaries if doubted or epoch not in (None, current)]
    if names:
        said = (
            f"history may have gone back (a restore, a clone, a failover) since these were compared: {', '.join(names)}"
        )
        return found_warning("history", said, "; ".join(f"outbox reconcile {name} --repair" for name in names))
    if unseen := [name for name, epoch, _ in secondaries if epoch is None]:
        return found_unknown("history", f"no relay has carried to {', '.join(unseen)} yet, so nothing to compare with")
    return found_ok("history", "the primary is the one that the secondaries were kept in step with")


async def _backfills(case: Case) -> Sequence[Finding]:
    running = await case.rows(BACKFILLS)
    if stuck := [f"{name} ({lag_text(age)})" for name, _, age in running if age > _UNMOVED]:
        said = f"has not moved: {', '.join(stuck)}"
        again = "; ".join(f"outbox backfill {name}" for name, _, age in running if age > _UNMOVED)
        return found_warning("backfill", said, f"{again} goes on where it stopped")
    return found_ok("backfill", "none stands still" if running else "none is under way")


TABLE_CHECKS: dict[str, Check] = {
    "privileges": _privileges,
    "persistence": _persistence,
    "triggers": _triggers,
    "vacuum": _vacuum,
    "sequence": _sequence,
    "history": _history,
    "backfill": _backfills,
}
"""By the name of their finding; they need the tables."""
