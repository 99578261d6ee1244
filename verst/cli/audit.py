"""Whether a run trained every group exactly once: audit."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from verst.cli.common import command, echo, number, one_line, print_json, size, takes_json, takes_run

if TYPE_CHECKING:
    from verst.journal.audit import Audit

_SHOWN = 20
"""Reasons, notes and events that a person is shown; --json has all."""


def add(commands: Any) -> None:
    parser = command(
        commands,
        "audit",
        "prove from a run's journal that every group was trained exactly once",
        "verst audit runs/NAME            also while it runs",
        "verst audit runs/NAME --json     everything, with the weights hash of each step",
        detail="Reads and verifies every byte of the journal. Exit code 1 if anything is wrong; each violation is named.",
    )
    takes_run(parser)
    takes_json(parser)
    parser.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    from verst.journal.audit import audit
    from verst.journal.lock import holder_of
    from verst.runtime.changes import reordered_since
    from verst.runtime.rundir import RunDirectory
    from verst.runtime.stored import checkpoint_steps

    run, config = RunDirectory.open(options.path)
    lives = holder_of(run.root) is not None
    found = audit(
        run.journal,
        run.run_id,
        checkpoints=checkpoint_steps(run),
        worst_staleness=config.worst_staleness,
        exact=config.run.deterministic and not reordered_since(run, 0),
    )
    if options.json:
        print_json({"ok": found.ok, "lives": lives, **asdict(found)})
    else:
        for line in _lines(found, lives=lives, bound=config.worst_staleness):
            echo(line)
    return 0 if found.ok else 1


def _lines(found: Audit, *, lives: bool, bound: int) -> list[str]:
    trained, dropped = found.groups_trained, sum(found.dropped.values())
    count = len(found.groups_unfinished)
    unfinished = f"{count} in flight" if lives else f"{count} unfinished" + (", which a resumed run generates again" if count else "")
    in_training = f", {found.groups_in_training} in the step in progress" if found.groups_in_training else ""
    given_up = f" ({found.segments_given_up} of which only the index is kept)" if found.segments_given_up else ""
    last = max(found.digests, default=0)
    versions = f"{min(found.published)} to {max(found.published)}" if found.published else "none yet"
    return [
        f"journal      {found.segments + found.segments_given_up} segment(s){given_up}, {size(found.bytes_checked)} verified",
        f"admitted     {found.groups_admitted} groups: {found.groups_finished} finished, {unfinished}",
        f"finished     {trained} trained in one step each{in_training}, {dropped} dropped, {found.groups_pending} waiting for a step",
        *_first(f"  dropped    {count}: {one_line(reason)}" for reason, count in found.dropped.items()),
        f"steps        {found.batches} batches, {len(found.digests)} commits; weights of step {last}: {found.digests.get(last, '-')}",
        f"served       versions {versions}",
        f"staleness    {_staleness(found)}; the bound is {bound}",
        f"checkpoints  {', '.join(map(str, found.checkpoints)) or 'none'}",
        *_first(f"changed      after step {c.step}: {_options(c.options)}" for c in found.changes),
        *_first(f"fault        after step {f.step}: {f.role}: {_opening(f.reason)}" for f in found.faults),
        *_first(f"recovery     {r.role} from {r.source}, at step {r.step}, in {number(r.seconds, '.1f')} s" for r in found.recoveries),
        *_first(f"note         {line}" for line in found.notes),
        *(f"violation    {one_line(line)}" for line in found.violations),
        "every group exactly once: " + ("yes" if found.ok else f"NO, {len(found.violations)} violation(s)"),
    ]


def _first(lines: Any) -> list[str]:
    all_lines = list(lines)
    more = len(all_lines) - _SHOWN
    return [*all_lines[:_SHOWN], *([f"  […] {more} more; --json has all"] if more > 0 else [])]


def _opening(reason: str) -> str:
    """Its first line: Ray tells of a death in ten, --json has all of them."""
    return one_line(reason.partition("\n")[0])


def _options(options: Any) -> str:
    return ", ".join(f"{name} {before} -> {after}" for name, (before, after) in options.items())


def _staleness(found: Audit) -> str:
    measured = sum(found.staleness.values())
    unknown = f" ({found.staleness_unknown} unknown)" if found.staleness_unknown else ""
    if not measured:
        return f"of no group known{unknown}"
    mean = sum(age * count for age, count in found.staleness.items()) / measured
    return f"mean {mean:.2f}, at most {max(found.staleness)} version(s){unknown}"
