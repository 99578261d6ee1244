"""Runs that live: check, train, resume, scale, watch."""

from __future__ import annotations

import argparse
from typing import Any

import verst
from verst.cli.common import command, echo, takes_run, takes_run_file


def add(commands: Any) -> None:
    check = command(
        commands,
        "check",
        "validate a run file and print its resolved options and its plan",
        "verst check run.yaml",
        "verst check run.yaml rollout.group_size=16   with an option replaced",
    )
    takes_run_file(check)
    check.set_defaults(run=_check)
    train = command(
        commands,
        "train",
        "train a new run",
        "verst train run.yaml",
        "verst train run.yaml train.lr=1e-5 run.name=b      options replaced",
        "verst train run.yaml --address auto                on the Ray cluster of this machine; closing the terminal changes nothing",
        "verst train run.yaml run.name=b --from runs/a@40   begin with the weights, the optimizer and the place in the data of another run",
    )
    takes_run_file(train)
    _takes_address(train)
    _takes_plain(train)
    train.add_argument(
        "--from",
        dest="begin_from",
        metavar="RUN[@STEP]",
        help="begin from a checkpoint of another run (default: its newest); steps and learning-rate schedule count from 0",
    )
    train.set_defaults(run=_train)
    resume = command(
        commands,
        "resume",
        "continue a run from its last checkpoint and its journal",
        "verst resume runs/NAME                     after a stop, a crash or a power cut",
        "verst resume runs/NAME train.ranks=2       on another number of ranks; what is learned stays the same",
        "verst resume runs/NAME run.steps=200       longer",
    )
    takes_run(resume)
    resume.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="options to change from here on: ranks, replicas, threads, deadlines, run.steps"
    )
    _takes_address(resume)
    _takes_plain(resume)
    resume.set_defaults(run=_resume)
    _add_scale(commands)
    watch = command(
        commands,
        "watch",
        "follow a run from any terminal",
        "verst watch runs/NAME             a live view; of a run that has ended its last state",
        "verst watch runs/NAME --plain     the last lines and, if it is alive, those to come",
    )
    takes_run(watch)
    _takes_plain(watch)
    watch.set_defaults(run=_watch)


def _add_scale(commands: Any) -> None:
    scale = command(
        commands,
        "scale",
        "change the number of engine replicas of a run while it goes on",
        "verst scale runs/NAME rollout=3               add or remove; what is in flight is finished, nothing pauses",
        "verst scale runs/NAME rollout=1 --wait 0      ask, and do not wait for it",
        detail="A new replica serves from the next published version on. One that is removed finishes its groups first. A resumed run\n"
        "begins with the number last reached.",
    )
    takes_run(scale)
    scale.add_argument("wish", metavar="rollout=N", help="how many replicas it shall have")
    scale.add_argument("--wait", metavar="SECONDS", type=float, default=600.0, help="how long to wait (default: 600); the wish stays")
    scale.set_defaults(run=_scale)


def _takes_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="the Ray cluster to run on ('auto': this machine's); default: a Ray of the run's own"
    )


def _takes_plain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="lines in place of the live view; the default where output is no terminal")


def _check(options: argparse.Namespace) -> int:
    from verst.config.load import dump_config, load_config
    from verst.config.plan import plan_lines
    from verst.runtime.extensions import Extensions
    from verst.runtime.preflight import preflight

    config = load_config(options.file, options.overrides)
    print(dump_config(config))
    found = preflight(config, Extensions())
    for line in plan_lines(config):
        print(line)
    for warning in found.warnings:
        print(f"warning: {warning}")
    return 0


def _train(options: argparse.Namespace) -> int:
    given = {"overrides": options.overrides, "address": options.address, "begin_from": options.begin_from}
    return _ended(verst.train(options.file, **given, echo=echo, live=not options.plain))


def _resume(options: argparse.Namespace) -> int:
    return _ended(verst.resume(options.path, overrides=options.overrides, address=options.address, echo=echo, live=not options.plain))


def _scale(options: argparse.Namespace) -> int:
    from verst.runtime.scale_request import scale

    scale(options.path, options.wish, wait_s=options.wait, echo=echo)
    return 0


def _watch(options: argparse.Namespace) -> int:
    from verst.runtime.watch import watch

    watch(options.path, echo=echo, live=not options.plain)
    return 0


def _ended(result: verst.RunResult) -> int:
    if result.detached:
        return 129  # as the shell counts a hangup; there is no terminal any more to say more on
    if result.interrupted:
        echo(f"stopped; continue with: verst resume {result.path}")
        return 130
    return 0
