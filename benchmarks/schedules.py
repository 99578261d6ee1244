"""Groups a second of the three schedules: whole runs that differ in slots and window alone.

    python benchmarks/schedules.py --model models/smollm2 [--engine sglang] [--backend fsdp] [--steps 30] [--epochs 1] [--set KEY=VALUE ...]

`synchronous`, `one-step-off` and `asynchronous` are those of `verst init --schedule`, with trainer and engine on a GPU of their own each.
The prompts ask for texts, whose lengths are heavy-tailed as a model's answers are. `--epochs` passes over each batch make training as long
as generation, where a schedule can gain most: `phases_s` shows how near they are. The learning rate is so low that lengths stay the same.

- `groups_per_s`: of the steps after the first, from their sum of time
- `speedup`: over synchronous
- `trainer_idle`: share of that time in which the trainer waits for groups or for a pull
- `staleness_max` beside `staleness_bound`, which `docs/staleness.md` proves

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import verst
from verst.config.load import load_config

SCHEDULES = {"synchronous": (1, False), "one-step-off": (2, False), "asynchronous": (3, True)}
"""Slots, in batches, and whether the window is a batch wide or 1."""

WAITING = ("rollout", "pull_wait")
TRAINING = ("load", "forward_backward", "optimizer", "publish", "commit")
THINGS = ("a lighthouse", "a river", "an old clock", "a letter", "a fox", "the moon", "a bridge", "a garden", "a train", "a storm")
FORMS = ("Write a short story about {}.", "Describe {} to a child.", "In one sentence, what is {}?", "List five facts about {}.")
PLACES = ("in winter", "by the sea", "in a small town", "at night", "in a desert", "long ago", "in a dream", "on a mountain")


def varied(trajectory: Any, fields: Any) -> float:
    """Differs between the members of a group, so that every step has a gradient."""
    return float(int(trajectory.tokens_T.sum()) % 7)


def prompts() -> Iterator[dict[str, str]]:
    for place in PLACES:
        for thing in THINGS:
            for form in FORMS:
                yield {"prompt": form.format(f"{thing} {place}")}


def run_file(schedule: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    batches, wide = SCHEDULES[schedule]
    groups = options.groups
    return {
        "run": {"dir": str(scratch), "name": schedule, "steps": options.steps, "deterministic": False},
        "model": {"path": options.model, "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
        "data": {"max_prompt_tokens": 128},
        "rollout": {
            "engine": options.engine,
            "group_size": options.group_size,
            "max_new_tokens": options.new,
            "max_running": batches * groups * options.group_size,
            **({"capacity_groups": batches * groups} if batches > 1 else {}),
            **({"window_groups": groups} if wide else {}),
        },
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
        "train": {"backend": options.backend, "groups_per_step": groups, "epochs": options.epochs, "lr": 1e-8},
        "fidelity": {"limit": 100.0},
        "checkpoint": {"every_steps": options.steps + 1, "export_final": False},
    }


def measure(schedule: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    config = load_config(run_file(schedule, options, scratch), options.set)
    run = verst.train(config, reward=varied, prompts=list(prompts()), echo=lambda line: print(line, flush=True))
    rows = [row for row in run.rows if row["kind"] == "step"][options.warm :]
    total = sum(row["time/step_s"] for row in rows)

    def phase(*names: str) -> float:
        return sum(row.get(f"time/{name}_s", 0.0) for row in rows for name in names)

    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    return {
        "groups_per_s": len(rows) * options.groups / total,
        "step_s": total / len(rows),
        "trainer_idle": phase(*WAITING) / total,
        "phases_s": {
            "rollout": phase("rollout") / len(rows),
            "training": phase(*TRAINING) / len(rows),
            "pull": phase("pull_wait") / len(rows),
        },
        "generated_tokens": mean("rollout/generated_tokens"),
        "staleness_mean": mean("staleness/mean"),
        "staleness_max": max(row["staleness/max"] for row in rows),
        "staleness_bound": config.worst_staleness,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a model that answers, such as models/smollm2")
    parser.add_argument("--engine", default="sglang")
    parser.add_argument("--backend", default="fsdp")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--groups", type=int, default=16, help="of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--new", type=int, default=512, help="tokens of a completion at most")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5, help="steps left out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the run file; may be repeated")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for schedule in options.schedules:
            found[schedule] = measure(schedule, options, Path(scratch))
            print(f"{schedule}: {json.dumps(found[schedule])}", flush=True)
    report: dict[str, Any] = {"benchmark": "schedules", **found}
    if "synchronous" in found:
        slow = found["synchronous"]["groups_per_s"]
        report["speedup"] = {name: values["groups_per_s"] / slow for name, values in found.items() if name != "synchronous"}
    settings = ("engine", "backend", "groups", "group_size", "new", "epochs", "steps")
    report |= {name: getattr(options, name) for name in settings}
    report["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps(report))


if __name__ == "__main__":
    main()
