"""Steps that a run has made, made again: replay."""

from __future__ import annotations

import argparse
from typing import Any

import verst
from verst.cli.common import command, echo, print_json, quiet_libraries, takes_json, takes_run, to_stderr


def add(commands: Any) -> None:
    parser = command(
        commands,
        "replay",
        "train journaled steps of a run again, and compare the weights with the committed ones",
        "verst replay runs/NAME --from 0              from what the run began with to its last commit, also while it runs",
        "verst replay runs/NAME --from 40 --to 45     steps 41 to 45, from the checkpoint of step 40 or the newest before it",
        detail="Needs no engine, environment or reward, and changes nothing in the run. One trainer rank works in this process, several\n"
        "under Ray. Exit code 1 if a step comes out with other weights; what is known of the reason is printed.",
    )
    takes_run(parser)
    parser.add_argument(
        "--from",
        dest="begin",
        metavar="STEP",
        type=int,
        required=True,
        help="the step whose state to begin with; 0: what the run began with",
    )
    parser.add_argument("--to", metavar="STEP", type=int, help="the last step to train (default: the last one committed)")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="the Ray cluster to train on ('auto': this machine's); default: this machine alone"
    )
    takes_json(parser)
    parser.set_defaults(run=_replay)


def _replay(options: argparse.Namespace) -> int:
    quiet_libraries()
    tell = to_stderr if options.json else echo
    found = verst.replay(options.path, options.begin, options.to, address=options.address, echo=tell)
    if options.json:
        print_json(found.described())
    else:
        for line in found.lines():
            echo(line)
    return 0 if found.first_difference is None else 1
