"""Who worked when: timeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.cli.common import command, echo, number_range, print_json, table, takes_json, takes_run

if TYPE_CHECKING:
    from verst.observe.idle import Shares

_STEPS = 20


def add(commands: Any) -> None:
    parser = command(
        commands,
        "timeline",
        "who was busy, idle, and waiting for what: a trace, a picture, and what holds the run up",
        f"verst timeline runs/NAME                      the newest {_STEPS} steps, also while it runs",
        "verst timeline runs/NAME --step 100:120       these; `:` is all of them",
        "verst timeline runs/NAME --out DIR            where to write, if not into the run's directory",
        detail="Writes timeline.trace.json (ui.perfetto.dev shows it) and timeline.png, and prints the idle share of each role.\n"
        "Evaluations are drawn, but no share of their time counts as idle or busy.",
    )
    takes_run(parser)
    parser.add_argument("--step", metavar="N or FROM:TO", type=number_range(int), help=f"these steps (default: the newest {_STEPS})")
    parser.add_argument("--out", metavar="DIR", type=Path, help="directory to write (default: the run's)")
    takes_json(parser)
    parser.set_defaults(run=_timeline)


def _timeline(options: argparse.Namespace) -> int:
    from verst.observe.idle import shares
    from verst.observe.recorded import read_timeline
    from verst.observe.timeline_picture import draw_timeline
    from verst.observe.trace import write_trace
    from verst.runtime.rundir import RunDirectory

    run, _ = RunDirectory.open(options.path)
    recorded = read_timeline(run.timeline)
    recorded = recorded.newest(_STEPS) if options.step is None else recorded.of_steps(*options.step)
    found = shares(recorded.steps, recorded.groups, recorded.pulls)
    out = options.out or run.root
    out.mkdir(parents=True, exist_ok=True)
    trace, picture = out / "timeline.trace.json", out / "timeline.png"
    first, last = recorded.steps[0].step, recorded.steps[-1].step
    judgement = f"; {found.bottleneck}" if found and found.bottleneck else ""
    write_trace(recorded, trace, run.root.name)
    draw_timeline(recorded, picture, f"{run.root.name}, steps {first} to {last}{judgement}")
    if options.json:
        print_json({"first": first, "last": last, **_described(found), "trace": str(trace), "picture": str(picture)})
        return 0
    for line in _lines(first, last, found):
        echo(line)
    echo(f"wrote {trace} (ui.perfetto.dev shows it) and {picture}")
    return 0


def _lines(first: int, last: int, found: Shares | None) -> list[str]:
    if found is None:
        return [f"steps {first} to {last} were trained again from the journal: they waited for nothing"]
    waits = ", ".join(f"{cause} {share:.0%}" for cause, share in found.waits.items() if found.replicas)
    roles = [("trainer", found.trainer, f"waited for {waits}" if waits else "")]
    roles += [(f"replica {n}", idle, "") for n, idle in found.replicas.items()]
    if found.replicas:
        roles.append(("scoring", found.scoring, ""))
    rows = [[name, f"{1 - idle:.0%}", f"{idle:.0%}", why] for name, idle, why in roles]
    lines = [
        f"steps {first} to {last}, {found.seconds:.1f} s without evaluations",
        *table(("role", "busy", "idle", ""), rows, right=(1, 2)),
    ]
    if found.bottleneck is None:
        return [*lines, "nothing was generated: there is only the trainer"]
    return [*lines, f"{found.generating:.1f} groups generating at a time", str(found.bottleneck)]


def _described(found: Shares | None) -> dict[str, Any]:
    if found is None:
        return {"seconds": 0.0, "idle": {}, "waits": {}, "generating": None, "bottleneck": None}
    idle = {"trainer": found.trainer} | {f"replica {n}": share for n, share in found.replicas.items()}
    idle |= {"scoring": found.scoring} if found.replicas else {}
    name = found.bottleneck and found.bottleneck.name
    return {"seconds": found.seconds, "idle": idle, "waits": dict(found.waits), "generating": found.generating, "bottleneck": name}
