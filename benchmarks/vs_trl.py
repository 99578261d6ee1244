"""Verst against TRL: the same small GRPO run as a command of each, from the start of its process.

    python benchmarks/vs_trl.py [--trl-python .venv-trl/bin/python] [--pairs 3]

TRL has an environment of its own, because it wants other packages:

    python3 -m venv .venv-trl
    .venv-trl/bin/pip install -r benchmarks/requirements-trl.txt

Both read one model directory (random weights, 0.3 million parameters, float32) and one file of prompts, and run on the CPU with the same
number of prompts, completions of each, new tokens at most, sampling (temperature 1, no filters), reward (a Python function: the share of a
completion's tokens that fall in a set), AdamW (rate, betas, weight decay, clipping), loss and threads of each process. Verst runs as
`verst train`: under Ray, synchronous, in deterministic mode, every version of the weights verified and probed, every group and step in
the journal. TRL runs in one process, without evaluation, reports and checkpoints (`vs_trl_trainer.py` has its settings).

Both print a line with the mean reward after each step; this process notes when it comes. Nothing else is measured, so both sides are
measured alike:

    first_reward_s   from the start of the process to the line of step 1
    reward_09_s      from the start of the process to the line of the first step whose reward is 0.9 or more
    steps_per_s      steps after the fifth over the time from its line to the last one

Runs alternate, the first of each pair in turn; both of a pair have one seed, each pair another. The last line is one JSON object: medians
over the pairs; `steps_per_s_ratio` is the median of the pairs' own ratios, above 1 where Verst is faster. Null: 0.9 was not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verst.recipes.tiny import build_tiny_model

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.9
WARMUP = 5
"""Steps that do not count for steps/s."""
DEADLINE_S = 900.0
"""Limit of one run."""
SETTINGS = ("steps", "groups", "group_size", "max_new_tokens", "lr", "seed", "threads")
"""What both sides are told of the task, beside model and prompts."""

VERST_LINE = re.compile(r"step +\d+/\d+  reward (?P<reward>\S+)")
TRL_LINE = re.compile(r"\{.*'reward': '?(?P<reward>[-+.e\d]+)")

INSTALL = """no TRL at {python}: {why}
Make an environment of its own for it, then run this again:
  python3 -m venv .venv-trl
  .venv-trl/bin/pip install -r benchmarks/requirements-trl.txt
or name the python of one with --trl-python"""

_VERSIONS = "import importlib.metadata as m, json; print(json.dumps({p: m.version(p) for p in ('trl', 'torch', 'transformers')}))"


@dataclass(frozen=True, slots=True)
class Reported:
    """A step's line: when it came, from the start of the process, and the mean reward that it tells."""

    at_s: float
    reward: float


@dataclass(frozen=True, slots=True)
class Side:
    """One run of one side, by its lines."""

    steps: Sequence[Reported]

    @property
    def first_reward_s(self) -> float:
        return self.steps[0].at_s

    @property
    def steps_to_goal(self) -> int | None:
        """The first step that reached the goal, counted from 1."""
        return next((number for number, step in enumerate(self.steps, 1) if step.reward >= GOAL), None)

    @property
    def goal_s(self) -> float | None:
        reached = self.steps_to_goal
        return None if reached is None else self.steps[reached - 1].at_s

    @property
    def steps_per_s(self) -> float:
        return (len(self.steps) - WARMUP) / (self.steps[-1].at_s - self.steps[WARMUP - 1].at_s)


def follow(command: Sequence[str], line_of_a_step: re.Pattern[str], steps: int, *, cwd: Path, env: Mapping[str, str]) -> Side:
    """Runs a command to its end and notes when each step's line comes. Raises `SystemExit` if it fails or reports too few steps."""
    found: list[Reported] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        began = time.perf_counter()
        with subprocess.Popen(
            command, cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            limit = threading.Timer(DEADLINE_S, process.kill)
            limit.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if match := line_of_a_step.match(line):
                        found.append(Reported(time.perf_counter() - began, float(match["reward"])))
                code = process.wait()
            finally:
                limit.cancel()
                process.kill()
        if code or len(found) != steps:
            errors.seek(0)
            said = errors.read()[-4000:]
            raise SystemExit(f"{' '.join(command)} ended with {code} after {len(found)} of {steps} steps (limit {DEADLINE_S:g} s):\n{said}")
    return Side(found)


# ---- the two sides


def environment(threads: int, **more: str) -> dict[str, str]:
    """What both commands get: threads, no search of the network for models, lines as they are printed."""
    same = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | same | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


def write_task(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Model and prompts, and the settings that both sides read them with."""
    model = build_tiny_model(directory / "model", hidden=96, layers=3, seed=options.seed)
    prompts = directory / "prompts.jsonl"
    count = options.groups * options.steps  # none is read twice
    prompts.write_text("".join(json.dumps({"prompt": f"How many sisters does brother {i} have?"}) + "\n" for i in range(count)))
    return {"model": str(model), "prompts": str(prompts), **{name: getattr(options, name) for name in SETTINGS}}


def verst_values(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Verst's run file. What it does not name is as `verst train` has it."""
    return {
        "run": {"name": "verst", "dir": str(directory), "steps": settings["steps"], "seed": settings["seed"]},
        "model": {"path": settings["model"], "dtype": "float32"},
        "data": {"path": settings["prompts"], "max_prompt_tokens": 64},
        "rollout": {"group_size": settings["group_size"], "max_new_tokens": settings["max_new_tokens"]}
        | {"max_running": settings["groups"] * settings["group_size"]},
        "reward": {"function": "benchmarks.vs_trl_reward:of_trajectory"},
        "train": {"groups_per_step": settings["groups"], "lr": settings["lr"], "threads": settings["threads"]},
        "checkpoint": {"every_steps": settings["steps"], "export_final": False},
    }


def run_verst(settings: Mapping[str, Any], directory: Path) -> Side:
    file = directory / "run.yaml"
    file.write_text(json.dumps(verst_values(settings, directory)))
    command = [sys.executable, "-m", "verst.cli", "train", str(file), "--plain"]
    return follow(command, VERST_LINE, settings["steps"], cwd=ROOT, env=environment(settings["threads"], PYTHONPATH=str(ROOT)))


def run_trl(settings: Mapping[str, Any], directory: Path, python: Path) -> Side:
    file = directory / "settings.json"
    file.write_text(json.dumps({**settings, "output": str(directory / "trl")}))
    command = [str(python), str(ROOT / "benchmarks" / "vs_trl_trainer.py"), str(file)]
    return follow(command, TRL_LINE, settings["steps"], cwd=directory, env=environment(settings["threads"]))


def trl_versions(python: Path) -> dict[str, str]:
    """Raises `SystemExit` with the commands that make the environment, if there is no TRL."""
    try:
        done = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise SystemExit(INSTALL.format(python=python, why=error.strerror)) from None
    if done.returncode:
        raise SystemExit(INSTALL.format(python=python, why=done.stderr.strip().splitlines()[-1]))
    return json.loads(done.stdout)


# ---- both together


def summary(pairs: Sequence[tuple[Side, Side]]) -> dict[str, Any]:
    """Medians over pairs of (Verst, TRL)."""
    verst, trl = [v for v, _ in pairs], [t for _, t in pairs]
    return {
        "first_reward_s": median(s.first_reward_s for s in verst),
        "trl_first_reward_s": median(s.first_reward_s for s in trl),
        "reward_09_s": _median_if_all([s.goal_s for s in verst]),
        "trl_reward_09_s": _median_if_all([s.goal_s for s in trl]),
        "steps_per_s_ratio": median(v.steps_per_s / t.steps_per_s for v, t in pairs),
        "steps_per_s": median(s.steps_per_s for s in verst),
        "trl_steps_per_s": median(s.steps_per_s for s in trl),
        "steps_to_09": _median_if_all([s.steps_to_goal for s in verst]),
        "trl_steps_to_09": _median_if_all([s.steps_to_goal for s in trl]),
    }


def _median_if_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None


def told(name: str, side: Side) -> str:
    goal = "0.9 not reached" if side.goal_s is None else f"0.9 after {side.goal_s:.1f} s and {side.steps_to_goal} steps"
    return f"  {name:5}  first reward after {side.first_reward_s:.1f} s, {goal}, then {side.steps_per_s:.2f} steps/s"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the pairs and returns the JSON object."""
    versions = trl_versions(options.trl_python)
    pairs: list[tuple[Side, Side]] = []
    with tempfile.TemporaryDirectory() as scratch:
        settings = write_task(Path(scratch), options)
        for number in range(options.pairs):
            directory = Path(scratch) / f"pair-{number}"
            directory.mkdir()
            sides: dict[str, Callable[[], Side]] = {
                "Verst": lambda at=directory: run_verst(settings, at),
                "TRL": lambda at=directory: run_trl(settings, at, options.trl_python),
            }
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            settings["seed"] = options.seed + number  # so that no lucky one decides
            print(f"pair {number + 1} of {options.pairs}", flush=True)
            ran: dict[str, Side] = {}
            for name in order:
                ran[name] = sides[name]()
                print(told(name, ran[name]), flush=True)
            pairs.append((ran["Verst"], ran["TRL"]))
    chosen = {name: getattr(options, name) for name in SETTINGS}
    return {"benchmark": "vs_trl", **summary(pairs), "pairs": options.pairs, **chosen, "cpus": os.cpu_count(), "trl_versions": versions}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python", metavar="PATH", help="of TRL's environment"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help=f"of each run; more than {WARMUP}")
    parser.add_argument("--groups", type=int, default=8, help="prompts a step")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-2, help="of 0.001, 0.003 and 0.01 the best for both sides")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process that computes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the first pair")
    options = parser.parse_args(arguments)
    if options.steps <= WARMUP + 1:
        parser.error(f"--steps: {WARMUP} steps are warm-up, so more than {WARMUP + 1} are needed")
    return options


def main() -> None:
    print(json.dumps(measure(parsed())))


if __name__ == "__main__":
    main()
