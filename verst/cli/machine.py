"""The machine, and what a step costs on it: doctor, profile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from verst.cli.common import command, echo, print_json, quiet_libraries, table, takes_json, takes_run


def add(commands: Any) -> None:
    doctor = command(
        commands,
        "doctor",
        "compare this machine with the versions that were tested and with what a run needs, and say what to change",
        "verst doctor            exit code 1 if something is lacking without which nothing runs",
        "verst doctor --json     the same for programs",
        detail="Looks at packages, GPUs and driver, processors, memory, /dev/shm, disks and their speed, limits, clock, ports and RDMA.",
    )
    takes_json(doctor)
    doctor.set_defaults(run=_doctor)
    profile = command(
        commands,
        "profile",
        "train one journaled step again under PyTorch's profiler: trace, operations, memory",
        "verst profile runs/NAME --step 40     needs no engine and no cluster, and changes nothing in the run",
        detail="Restores the checkpoint before the step and trains the journaled steps from there on, in this process on one rank.\n"
        "Look at trace.json in ui.perfetto.dev, at memory.pickle (GPUs only) in pytorch.org/memory_viz.",
    )
    takes_run(profile)
    profile.add_argument("--step", metavar="N", type=int, required=True, help="a step whose batch is in the journal")
    profile.add_argument("--out", metavar="DIR", type=Path, help="directory to write (default: profile-NAME-N)")
    profile.set_defaults(run=_profile)


def _doctor(options: argparse.Namespace) -> int:
    from verst.doctor import examine

    found = examine()
    if options.json:
        print_json(found.described())
    else:
        for line in found.lines():
            echo(line)
    return 1 if found.lacking else 0


def _profile(options: argparse.Namespace) -> int:
    quiet_libraries()
    from verst.runtime.profiling import profile_step
    from verst.runtime.standalone import device_here

    out = options.out or Path(f"profile-{options.path.name}-{options.step}")
    found = profile_step(options.path, options.step, out, device=device_here())
    weights = {True: "as committed", False: "NOT as committed: other machine, versions or threads than then", None: "never committed"}
    echo(f"step {found.step}, trained again from {found.begun_from}; weights {weights[found.same_weights]}")
    total = sum(found.phases_s.values())
    echo("  ".join(f"{name} {s:.3f} s ({s / total:.0%})" for name, s in found.phases_s.items()))
    rows = [[f"{1e3 * o.self_s:.1f}", str(o.calls), f"{o.nbytes / (1 << 20):.1f}", o.name] for o in found.operators]
    for line in table(("self ms", "calls", "MiB kept", "operation"), rows, right=(0, 1, 2)):
        echo(line)
    echo(f"wrote {found.trace} (ui.perfetto.dev shows it) and {found.operators_file}")
    if found.memory is None:
        echo("no memory snapshot: PyTorch records those of GPUs only")
    else:
        echo(f"wrote {found.memory} (pytorch.org/memory_viz shows it)")
    return 0
