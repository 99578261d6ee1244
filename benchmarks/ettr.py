"""What faults cost a run: the same run twice, undisturbed and with kills of its processes.

    python benchmarks/ettr.py [--pair embedded|production] [--steps 200] [--share 0.1] [--step-s 5] [--seed 0] [--dir DIR]
        [--gpus 3]

In a share of the steps, drawn at random, one process gets SIGKILL at a random moment of the step. Its role is drawn uniformly: one of two
trainer ranks, the replica's process, its reward worker, a snapshot holder; in the production pair also SGLang's server.

The model is tiny, so a step is padded: the rewards of its 16 trajectories sleep for --step-s in all, in one worker of each replica. What is
not padded comes on top. `step_s` is the median of the undisturbed run. What was scored when a replica dies is rolled and scored again,
as it would be in a long rollout.

    ettr              effective training time ratio: seconds from the first commit to the last, undisturbed over with kills
    recovery_s        by role: for each step with a kill, seconds from the commit before to the one behind it, less `step_s`; the median
                      and the longest. Where a group is rolled again this includes it
    lost_groups       groups that were admitted and neither trained nor dropped, and places in batches that nobody filled
    duplicate_groups  groups that were trained more than once
    same_weights      whether the weights hash of every step is that of the undisturbed run

The run is synchronous and, in the embedded pair, deterministic, so there the weights must agree. The last line is one JSON object.

Where there are GPUs, ranks and replicas have them. With `--gpus 3` one GPU counts as three: both ranks and the replica use it, and NCCL's
collectives go over a socket.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.campaign import ONE_GPU, on_one_gpu
from tests.loop.local import LocalRun, local_run
from verst.fault_injection import FaultInjector
from verst.journal.audit import audit
from verst.journal.log import Journal, JournalReader
from verst.journal.records import CommitRecord
from verst.runtime.placement import Placement, place
from verst.runtime.rundir import RunDirectory
from verst.runtime.service import RunService
from verst.testing import tiny_model

GROUPS, MEMBERS = 4, 4
COMMITTED = "commit"
ROLES: dict[str, dict[str, tuple[str, str | None]]] = {
    "embedded": {
        "trainer rank 0": ("trainer rank 0", None),
        "trainer rank 1": ("trainer rank 1", None),
        "replica": ("replica", None),
        "reward worker": ("replica", "verst.rewards.worker"),
        "snapshot holder": ("snapshot holder 0", None),
    }
}
ROLES["production"] = ROLES["embedded"] | {"server": ("replica", "verst.rollout.sglang.launch")}
"""Whom a kill hits: the worker, and words of the command line of a process below it."""


def padded(sleep_s: float) -> Any:
    """A reward that varies between the members of a group and takes its time."""

    def reward(trajectory: Any, fields: Any) -> float:
        time.sleep(sleep_s)
        return float(sum(map(ord, trajectory.completion)) % 7)

    return reward


def make_run(directory: Path, model: Path, pair: str, steps: int, step_s: float, gpus: int) -> LocalRun:
    values: dict[str, Any] = {
        "run": {"name": "run", "dir": str(directory), "steps": steps, "seed": 3},
        "rollout": {"group_size": MEMBERS, "max_new_tokens": 8, "max_running": GROUPS * MEMBERS},
        "reward": {"workers": 1},
        "train": {"groups_per_step": GROUPS, "threads": 1, "lr": 1e-3, "ranks": 2, "deadline_s": 120},
        "checkpoint": {"every_steps": 20},
    }
    replicas = gpus if gpus == values["train"]["ranks"] else 1  # in turns with the ranks, which needs equally many on each GPU
    values["rollout"]["replicas"] = replicas
    if pair == "production":
        values["rollout"]["engine"] = "sglang"
        values["weights"] = {"transport": "group"}
        values["train"] |= {"backend": "megatron", "megatron": {"tensor_model_parallel_size": 2}, "microbatch_tokens": 256}
    rows = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]
    return local_run(directory, model, values, reward=padded(replicas * step_s / (GROUPS * MEMBERS)), prompts=rows)


async def timed(run: LocalRun, injector: FaultInjector, placement: Placement) -> list[float]:
    """Runs to the end with its faults. Returns when each step was committed, in seconds of `time.monotonic`."""
    loop, commits = asyncio.get_running_loop(), []
    append = Journal.append_commit

    def told(self: Journal, record: CommitRecord) -> None:
        append(self, record)
        commits.append(time.monotonic())
        loop.call_soon_threadsafe(injector.moment, COMMITTED)

    with mock.patch.object(Journal, "append_commit", told):
        spawn = on_one_gpu(injector.spawn) if ONE_GPU in os.environ else injector.spawn
        service = RunService(str(run.run.root), spawn, placement)
        try:
            await service.run()
        finally:
            for line in (await service.lines(0, 0))[1]:
                print(line, file=sys.stderr)
    return commits


def planned(injector: FaultInjector, pair: str, steps: int, share: float, step_s: float, seed: int) -> list[str]:
    """The role that each kill hits."""
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(2, steps + 1), min(steps - 1, round(share * steps))))
    found = []
    for step in chosen:
        role = rng.choice(sorted(ROLES[pair]))
        victim, child = ROLES[pair][role]
        injector.plan(victim, COMMITTED, step - 1, delay_s=rng.uniform(0, step_s), child=child)
        found.append(role)
    return found


def counted(run: LocalRun, steps: int) -> dict[str, Any]:
    found = audit(run.run.journal, run.run.run_id)
    reader = JournalReader(run.run.journal)
    trained = [seq for step in range(1, steps + 1) for seq in reader.batch(step).groups]
    return {
        "lost_groups": len(found.groups_unfinished) + steps * GROUPS - len(trained),
        "duplicate_groups": len(trained) - len(set(trained)),
        "violations": found.violations,
    }


def digests(run: LocalRun, steps: int) -> list[str]:
    reader = JournalReader(run.run.journal)
    return [reader.commit(step).digest for step in range(1, steps + 1)]


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    model, gpus = tiny_model(directory / "model"), int(ray.cluster_resources().get("GPU", 0))
    runs = [make_run(directory / name, model, args.pair, args.steps, args.step_s, gpus) for name in ("undisturbed", "killed")]
    placement = place(RunDirectory.open(runs[0].run.root)[1], gpus)
    calm = asyncio.run(timed(runs[0], FaultInjector(), placement))
    injector = FaultInjector()
    kills = planned(injector, args.pair, args.steps, args.share, args.step_s, args.seed)
    hit = asyncio.run(timed(runs[1], injector, placement))
    step_s = median(after - before for before, after in itertools.pairwise(calm))
    costs: dict[str, list[float]] = {}
    for role, fault in zip(kills, injector.faults, strict=True):
        behind = bisect(hit, fault.at)  # not the step that was drawn: the moment may be behind its end
        if fault.struck is not None and 0 < behind < len(hit):
            costs.setdefault(role, []).append(hit[behind] - hit[behind - 1] - step_s)
    return {
        "benchmark": "ettr",
        "pair": args.pair,
        "gpus": gpus,
        "steps": args.steps,
        "kills": sum(fault.struck is not None for fault in injector.faults),
        "padded_s": args.step_s,
        "step_s": round(step_s, 2),
        "undisturbed_s": round(calm[-1] - calm[0], 1),
        "killed_s": round(hit[-1] - hit[0], 1),
        "ettr": round((calm[-1] - calm[0]) / (hit[-1] - hit[0]), 4),
        "recovery_s": {
            role: {"kills": len(seconds), "median": round(median(seconds), 1), "longest": round(max(seconds), 1)}
            for role, seconds in sorted(costs.items())
        },
        "same_weights": digests(runs[0], args.steps) == digests(runs[1], args.steps),
        **counted(runs[1], args.steps),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(ROLES), default="embedded")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.1, help="of the steps with a kill")
    parser.add_argument("--step-s", type=float, default=5.0, help="seconds that a step is padded to have")
    parser.add_argument("--seed", type=int, default=0, help="of steps, roles and moments")
    parser.add_argument("--dir", type=Path, help="where the runs are written; default: a temporary directory")
    parser.add_argument("--gpus", type=int, help="that one GPU shall count as; default: what is there")
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error("--steps: at least 3, so that a step lies between two commits")
    if args.gpus:
        os.environ[ONE_GPU] = "1"
    ray.init(
        address="local",
        num_gpus=args.gpus,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=1 << 28,
    )
    try:
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="ettr-") as directory:
            print(json.dumps(measure(args, Path(directory))))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
