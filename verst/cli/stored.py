"""What runs have left: runs, inspect."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.cli.common import clipped, command, echo, number, number_range, one_line, print_json, size, table, takes_json, takes_run, width

if TYPE_CHECKING:
    from verst.journal.log import JournalReader
    from verst.journal.query import Found
    from verst.runtime.listing import Comparison, RunSummary

_STATUSES = ("finished", "truncated", "failed")
_ORDERS = ("group", "reward", "step", "tokens", "logprob")
_COLUMN = 36
"""Characters of a trajectory in the view of a group, where the output is no terminal or a narrow one."""


def add(commands: Any) -> None:
    _add_runs(commands)
    _add_inspect(commands)


def _add_runs(commands: Any) -> None:
    runs = command(
        commands,
        "runs",
        "list runs, or compare some of them",
        "verst runs                                      those below ./runs",
        "verst runs /shared/runs --json",
        "verst runs --compare runs/a runs/b              by the reward, at the same shares of their steps; and what was set otherwise",
        "verst runs --compare runs/a runs/b --metric eval/reward --metric mismatch/k3",
    )
    runs.add_argument("dir", metavar="DIR", nargs="?", default="runs", type=Path, help="where to look (default: runs)")
    runs.add_argument("--compare", metavar="RUN", nargs="+", type=Path, help="runs to put beside each other")
    runs.add_argument(
        "--metric", metavar="NAME", action="append", help="what to compare; may be repeated (default: reward, else loss/total)"
    )
    takes_json(runs)
    runs.set_defaults(run=_runs)


def _add_inspect(commands: Any) -> None:
    inspect = command(
        commands,
        "inspect",
        "read trajectories from a run's journal, also while it runs; needs no GPU and no cluster",
        "verst inspect runs/NAME                                  the newest trajectories",
        "verst inspect runs/NAME --reward 0:0.5 --sort tokens     rewarded with at most 0.5, the longest last",
        "verst inspect runs/NAME --status failed --step 10:       that failed, from step 10 on",
        "verst inspect runs/NAME --prompt brothers --limit 5      whose prompt has this word, or this id",
        "verst inspect runs/NAME --group 12                       one group, side by side",
        "verst inspect runs/NAME --trajectory 12/3                one conversation",
        "verst inspect runs/NAME --trajectory 12/3 --tokens       token by token",
    )
    takes_run(inspect)
    inspect.add_argument(
        "--reward",
        metavar="LOW:HIGH",
        type=number_range(float),
        help="only these rewards; either end may be left out (below 0: --reward=-1:0)",
    )
    inspect.add_argument("--status", choices=_STATUSES, action="append", help="only these; may be repeated")
    inspect.add_argument("--step", metavar="N or FROM:TO", type=number_range(int), help="only trajectories that these steps consumed")
    inspect.add_argument("--prompt", metavar="TEXT", help="only prompts with this text, or with an id that has it")
    inspect.add_argument("--sort", choices=_ORDERS, default="group", help="ascending by this (default: group, the order of admission)")
    inspect.add_argument("--reverse", action="store_true", help="descending")
    inspect.add_argument("--limit", metavar="N", type=_count, default=20, help="show the last N, 0 for all (default: 20)")
    inspect.add_argument("--group", metavar="SEQ", type=int, help="one group, its trajectories side by side")
    inspect.add_argument("--trajectory", metavar="ID", help="one trajectory, by its id GROUP/MEMBER")
    inspect.add_argument(
        "--tokens", action="store_true", help="with --trajectory: each token with its log-probability, version and loss mask"
    )
    takes_json(inspect)
    inspect.set_defaults(run=_inspect)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


# ---- runs


def _runs(options: argparse.Namespace) -> int:
    from verst.runtime.listing import compare, find_runs, summarize

    if options.compare:
        metrics = options.metric or [next((s.measure for s in map(summarize, options.compare) if s.measure), "reward")]
        found = compare(options.compare, metrics)
        if options.json:
            print_json(_comparison_json(found))
        else:
            for line in _comparison_lines(found):
                echo(line)
        return 0
    summaries = [summarize(path) for path in find_runs(options.dir)]
    if options.json:
        print_json([summary.described() for summary in summaries])
    elif not summaries:
        echo(f"no run below {options.dir}; `verst train FILE` makes them in run.dir")
    else:
        for line in _run_lines(summaries, options.dir):
            echo(line)
    return 0


def _run_lines(summaries: Sequence[RunSummary], root: Path) -> list[str]:
    rows = []
    bests = any(s.best for s in summaries)
    for s in summaries:
        name = str(s.path.relative_to(root)) if s.path != root else str(s.path)
        name += f" (from {s.begun_from})" if s.begun_from else ""
        if s.problem:
            rows.append([name, s.state, "-", "", "-", *([""] if bests else []), "-", s.problem])
            continue
        change = f"{number(s.first)} -> {number(s.last)}" if s.measure else "-"
        best = [f"step {s.best.step}: {s.best.metric} {number(s.best.value)}" if s.best else "-"] if bests else []
        active = "-" if s.active is None else s.active.strftime("%Y-%m-%d %H:%M:%S")
        rows.append([name, s.state, f"{s.step}/{s.steps}", s.measure or "", change, *best, active, size(s.disk_bytes)])
    header = ("run", "state", "step", "", "first -> last", *(["best checkpoint"] if bests else []), "last activity", "disk")
    return table(header, rows, right=(2,))


def _comparison_lines(found: Comparison) -> list[str]:
    from verst.runtime.listing import QUANTILES

    lines = []
    for metric in dict.fromkeys(curve.metric for curve in found.curves):
        rows = [
            [_shown(c.run), *(f"{number(v, '.4g')} @{s}" for s, v in zip(c.steps, c.values, strict=True)), number(c.best, ".4g")]
            for c in found.curves
            if c.metric == metric and c.steps
        ]
        shares = [f"{q:.0%} of steps" for q in QUANTILES]
        lines += [*table((metric, *shares, "best"), rows, right=range(1, len(QUANTILES) + 2)), ""]
    names = [run.name for run in found.runs]
    if found.settings:
        rows = [[key, *("-" if v is None else one_line(str(v)) for v in values)] for key, values in found.settings.items()]
        return [*lines, *table(("set otherwise", *names), rows)]
    return [*lines, "all options are the same, but for names"]


def _shown(path: Path) -> str:
    """A path as a person would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _comparison_json(found: Comparison) -> dict[str, Any]:
    curves = [
        {"run": str(c.run), "metric": c.metric, "steps": c.steps, "values": c.values, "final": c.final, "best": c.best}
        for c in found.curves
    ]
    return {"runs": [str(run) for run in found.runs], "curves": curves, "settings": found.settings}


# ---- inspect


def _inspect(options: argparse.Namespace) -> int:
    from verst.errors import ConfigError
    from verst.journal.log import JournalReader
    from verst.runtime.rundir import RunDirectory

    if options.tokens and options.trajectory is None:
        raise ConfigError("--tokens needs --trajectory ID, such as --trajectory 12/3: `verst inspect RUN` lists the ids")
    run, config = RunDirectory.open(options.path)
    journal = JournalReader(run.journal, run.run_id)
    if options.trajectory is not None:
        return _show_trajectory(journal, options, [config.model.path, str(run.final)])
    found = _found(journal, options)
    if options.json:
        print_json([one.described() for one in found])
    elif options.group is not None:
        for line in _group_lines(found):
            echo(line)
    else:
        for line in _list_lines(found, options.limit):
            echo(line)
        gone = journal.index.groups.count_in(journal.given_up)
        kept = f"; {gone} were given up (checkpoint.journal_limit_bytes) and are not searched" if gone else ""
        echo(f"{journal.index.last_commit} steps committed, {len(journal.index.groups)} groups in the journal{kept}")
    return 0


def _found(journal: JournalReader, options: argparse.Namespace) -> list[Found]:
    from verst.journal.query import Query, last_of
    from verst.types import Status

    query = Query(
        rewards=options.reward or (None, None),
        statuses=frozenset(Status(name) for name in options.status or ()),
        steps=options.step or (None, None),
        prompt=options.prompt,
        group=options.group,
    )
    limit = options.limit if options.group is None else 0
    return last_of(journal, query, order=options.sort, reverse=options.reverse, limit=limit)


def _list_lines(found: Sequence[Found], limit: int) -> list[str]:
    rows = []
    for f in found:
        step = "-" if f.step is None else f"{f.step}{' dropped' if f.dropped else ''}"
        versions = "-" if f.versions is None else "-".join(dict.fromkeys(map(str, f.versions)))
        text = f.trajectory.error if f.trajectory.error is not None else f.trajectory.completion
        figures = [number(f.trajectory.reward), str(f.trajectory.generated_tokens), number(f.mean_logprob), versions]
        rows.append([f.trajectory.id, step, str(f.trajectory.status), *figures, f.group.prompt.id, clipped(one_line(text), 60)])
    header = ("id", "step", "status", "reward", "tokens", "logprob", "version", "prompt", "completion, or why it failed")
    note = [f"the last {limit}; --limit 0 shows all"] if limit and len(rows) == limit else []
    return [*table(header, rows, right=(1, 3, 4, 5, 6)), *note] if rows else ["no trajectory fits"]


def _group_lines(found: Sequence[Found]) -> list[str]:
    """The prompt, then the trajectories in columns, as many beside each other as the terminal has room for."""
    if not found:
        return ["no trajectory of that group fits"]
    group = found[0].group
    step = "no step has consumed it yet" if found[0].step is None else f"step {found[0].step}{' dropped it' if found[0].dropped else ''}"
    lines = [f"group {group.seq}, prompt {group.prompt.id}, {step}", *_message_lines(group.prompt.messages), ""]
    columns = max(1, min(len(found), (width() if width() < 1000 else 120) // _COLUMN))
    for first in range(0, len(found), columns):
        cells = [_cell(f) for f in found[first : first + columns]]
        height = max(map(len, cells))
        padded = [[*cell, *[""] * (height - len(cell))] for cell in cells]
        lines += [" │ ".join(line.ljust(_COLUMN - 3) for line in row).rstrip() for row in zip(*padded, strict=True)]
        lines.append("")
    return lines[:-1]


def _cell(found: Found) -> list[str]:
    t = found.trajectory
    head = f"{t.id}  reward {number(t.reward)}"
    branches = f", {len(t.branches)} branches" if t.branches else ""
    about = f"{t.status}, {t.generated_tokens} tokens, {number(found.mean_logprob)}{branches}"
    text = t.error if t.error is not None else "\n".join(turn.text for turn in t.turns)
    wrapped = [line for part in text.split("\n") for line in textwrap.wrap(one_line(part), _COLUMN - 3) or [""]]
    return [head, about, "─" * (_COLUMN - 3), *wrapped]


def _message_lines(messages: Any) -> list[str]:
    return [line for m in messages for line in (f"[{m.role}]", *(f"  {one_line(part)}" for part in m.content.split("\n")))]


def _show_trajectory(journal: JournalReader, options: argparse.Namespace, tokenizers: Sequence[str]) -> int:
    from verst.fields import plain
    from verst.journal.query import find_trajectory, token_rows

    found = find_trajectory(journal, options.trajectory)
    t, decode = found.trajectory, _decoder(tokenizers) if options.tokens else None
    rows = [] if decode is None else [token_rows(one, decode) for one in t.sequences]
    if options.json:
        told = found.described()
        for own, of_sequence in zip((told, *told["branches"]) if rows else (), rows, strict=True):
            own["token_rows"] = of_sequence
        print_json(told)
        return 0
    step = "no step yet" if found.step is None else f"step {found.step}"
    echo(f"trajectory {t.id}, {step}, {t.status}, reward {number(t.reward)}, {t.generated_tokens} generated tokens, seed {t.seed}")
    if t.error:
        echo(f"failed: {t.error}")
    for branch, one in enumerate(t.sequences):
        if branch:
            echo(f"branch {branch} of {len(t.branches)}, {len(one.tokens_T)} tokens")
        for line in _token_lines(rows[branch]) if rows else _message_lines(one.messages):
            echo(line)
    for name, value in t.info.items():
        echo(f"info {name}: {value}")
    for name, value in t.fields.items():
        echo(f"field {name}: {plain(value)}")
    return 0


def _token_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [
        [
            str(row["place"]),
            str(row["token"]),
            number(row["logprob"], ".4f"),
            "-" if row["logprob"] is None else f"{math.exp(row['logprob']):.1%}",
            "-" if row["version"] is None else str(row["version"]),
            "loss" if row["in_loss"] else "",
            "?" if row["text"] is None else repr(row["text"]),
        ]
        for row in rows
    ]
    return table(("place", "token", "logprob", "chance", "version", "mask", "text"), cells, right=(0, 1, 2, 3, 4))


def _decoder(paths: Sequence[str]) -> Callable[[int], str | None]:
    """Text of single tokens by the first tokenizer that is there; None for each token if the model has gone away."""
    from verst.data.chat import load_tokenizer
    from verst.errors import ModelError

    for path in paths:
        try:
            tokenizer = load_tokenizer(path)
        except ModelError:
            continue
        return lambda token: str(tokenizer.decode([token]))
    return lambda token: None
