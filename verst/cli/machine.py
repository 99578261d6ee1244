"""The machine, and what a step costs on it: doctor, profile."""

from __future__ import annotations

import argparse
from typing import Any

from verst.cli.common import command, echo, print_json, takes_json


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


def _doctor(options: argparse.Namespace) -> int:
    from verst.doctor import examine

    found = examine()
    if options.json:
        print_json(found.described())
    else:
        for line in found.lines():
            echo(line)
    return 1 if found.lacking else 0
