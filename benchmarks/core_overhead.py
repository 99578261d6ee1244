"""What the core adds to a synchronous step: a real run under Ray against its bare calls, alone in one process.

    python benchmarks/core_overhead.py [--smollm2 DIR] [--repeats 3] [--steps 24]

The run is the quickstart's GRPO half from an untrained model (it always generates `max_new_tokens`). The bare side takes its prompts, seeds
and weights, step by step, from the run's journal and does only what no trainer can leave out: `engine.generate` of the whole batch at
once, the reward function on each trajectory, `load_batch`, `forward_backward` and `optimizer_step`; no Ray, journal, publishing,
verification or other process. Tokens, rewards and weights hash of each step must come out as journaled, so both sides did the same work.

    overhead_share = 1 - bare / step        step: wall-clock time without evaluation and checkpoint; medians after `--warmup` steps

Runs and bare sides alternate, at the same process priority and thread count. `--smollm2` (a Hugging Face directory of SmolLM2-135M)
measures the same at a size where computing takes longer. The last line is one JSON object; times in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verst.config.load import load_config, resolved
from verst.config.schema import Config
from verst.data.chat import ChatRenderer, load_tokenizer
from verst.journal.log import JournalReader
from verst.observe.sinks import read_rows
from verst.observe.spans import Spans
from verst.recipes.tiny import build_tiny_model
from verst.rewards.spec import RewardSpec
from verst.rollout.hf import HFEngine
from verst.rollout.policy import stable_seed
from verst.runtime.batching import advantages, assemble
from verst.training.fsdp import FsdpBackend
from verst.types import GenerateRequest, Group, Manifest, Sampling
from verst.weights.checksum import tensor_checksum
from verst.weights.files import describe
from verst.weights.push import push

ROOT = Path(__file__).resolve().parents[1]
Seconds = dict[str, float]

RAY_NICENESS = 15
"""Ray lowers the priority of its workers by so much, unless RAY_worker_niceness says otherwise; the bare side must not do better."""

ALONE = {"rollout": ("engine", "reward"), "load": ("load",), "forward_backward": ("forward_backward",), "optimizer": ("optimizer",)}
"""Which bare calls each phase of a run contains. Every other phase is the core's own."""

NOT_THE_STEP = ("step", "evaluate", "checkpoint")


# ---- the bare side


@dataclass(frozen=True)
class TrainedWeights:
    """The backend's weights on their way into an engine of the same process."""

    manifest: Manifest
    backend: FsdpBackend

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.backend.weights()

    def checksum(self, tensor: torch.Tensor) -> str:
        return tensor_checksum(tensor)


class BareRun:
    """The calls that a run's steps consist of, repeated from its journal. `steps` yields the seconds of each call, step by step."""

    def __init__(self, run: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config = config = load_config(run / "config.yaml")
        self._journal = JournalReader(run / "journal")
        self._reward: Callable[..., Any] = RewardSpec.of(config.reward).build()
        self._backend = FsdpBackend(config, rank=0, world=1, device=device)
        self._engine = HFEngine(
            config.model.path,
            dtype=config.model.dtype,
            device=device,
            max_running=config.rollout.max_running,
            max_model_tokens=config.max_trajectory_tokens,
            deterministic=config.run.deterministic,
        )
        stop = ChatRenderer(load_tokenizer(config.model.path)).stop_token_ids
        rollout = config.rollout
        self._sampling = Sampling(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, tuple(rollout.stop), tuple(stop)
        )

    async def steps(self) -> list[Seconds]:
        """Raises `SystemExit` if a step comes out otherwise than in the run."""
        await self._engine.start()
        try:
            return [await self._step(step) for step in range(1, self._journal.index.last_commit + 1)]
        finally:
            await self._engine.close()

    async def _step(self, step: int) -> Seconds:
        groups = [self._journal.group(seq) for seq in self._journal.batch(step).groups]
        spans = Spans()
        await self._roll(groups, spans)
        self._train(step, groups, spans)
        manifest = describe(step, self._backend.weights())
        _require_same(f"weights hash of step {step}", manifest.digest, self._journal.commit(step).digest)
        await push(self._engine, TrainedWeights(manifest, self._backend), deadline_s=self.config.weights.deadline_s)
        return spans.seconds

    async def _roll(self, groups: Sequence[Group], spans: Spans) -> None:
        trajectories = [(t, g.prompt.fields) for g in groups for t in g.trajectories]
        requests = [self._request(t) for t, _ in trajectories]
        with spans("engine"):
            generations = await asyncio.gather(*(self._engine.generate(request) for request in requests))
        with spans("reward"):
            rewards = [self._reward(t, fields) for t, fields in trajectories]
        for (t, _), generation, reward in zip(trajectories, generations, rewards, strict=True):
            _require_same(f"completion {t.id}", generation.tokens_T.tolist(), t.tokens_T[t.loss_mask_T].tolist())
            _require_same(f"reward of {t.id}", reward, t.reward)

    def _request(self, trajectory: Any) -> GenerateRequest:
        """The first turn's request, as `GroupRoller` made it."""
        given_T = trajectory.tokens_T[: trajectory.turns[0].generated].copy()  # the journal's arrays are read-only
        return GenerateRequest(trajectory.id, given_T, self._sampling, stable_seed(stable_seed(trajectory.seed, 0), 0))

    def _train(self, step: int, groups: Sequence[Group], spans: Spans) -> None:
        batch = assemble(step, groups, self.config.algorithm)
        with spans("load"):
            scores = self._backend.load_batch(batch)
        values = advantages(batch, self.config, scores.reference_kl)
        for update in range(self._backend.num_updates):
            with spans("forward_backward"):
                self._backend.forward_backward(update, values)
            with spans("optimizer"):
                self._backend.optimizer_step(update)


def _require_same(what: str, bare: Any, journaled: Any) -> None:
    if bare != journaled:
        raise SystemExit(f"{what} is {bare} on the bare side and {journaled} in the journal: the two sides did not do the same work")


def bare_in_a_process(run: Path, threads: int) -> list[Seconds]:
    """The bare side in a fresh process with the environment that Verst gives its workers."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, "--bare", str(run)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the bare side of {run} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def bare_main(run: Path) -> None:
    wanted = int(os.environ.get("RAY_worker_niceness", RAY_NICENESS))  # noqa: SIM112 - Ray spells it so
    os.nice(max(wanted - os.nice(0), 0))
    print(json.dumps(asyncio.run(BareRun(run).steps())))


# ---- the run's side


def run_steps(run: Path) -> list[Seconds]:
    """Seconds of each phase of each step, without evaluation and checkpoint; `replica` is the longest that a group spent in its replica."""
    journal = JournalReader(run / "journal")
    steps = []
    for row in read_rows(run / "metrics.jsonl"):
        if row["kind"] == "step":
            phases = {key[len("time/") : -len("_s")]: value for key, value in row.items() if key.startswith("time/")}
            groups = [journal.group(seq) for seq in journal.batch(row["step"]).groups]
            replica = {"replica": max(g.timings["roll_s"] for g in groups)}
            steps.append(replica | {name: seconds for name, seconds in phases.items() if name not in NOT_THE_STEP})
    return steps


# ---- both


@dataclass(frozen=True)
class Measured:
    """One setting: steps of the run and the same steps bare, of each repeat."""

    name: str
    runs: Sequence[Sequence[Seconds]]
    bares: Sequence[Sequence[Seconds]]

    @property
    def step_s(self) -> float:
        return median(run_total(step) for steps in self.runs for step in steps)

    @property
    def bare_s(self) -> float:
        return median(sum(step.values()) for steps in self.bares for step in steps)

    @property
    def overhead_share(self) -> float:
        return 1 - self.bare_s / self.step_s

    def run(self) -> Seconds:
        return medians([step for steps in self.runs for step in steps])

    def bare(self) -> Seconds:
        return medians([step for steps in self.bares for step in steps])

    def repeat_shares(self) -> list[float]:
        """The share of each repeat by itself: how far the machine's noise moves it."""
        return [Measured(self.name, [r], [b]).overhead_share for r, b in zip(self.runs, self.bares, strict=True)]

    def summary(self) -> dict[str, Any]:
        run, bare = self.run(), self.bare()
        train = [phase for phase in ALONE if phase != "rollout"]
        return {
            "step_s": self.step_s,
            "bare_s": self.bare_s,
            "run": {
                "engine_s": run["replica"],
                "reward_s": max(run["rollout"] - run["replica"], 0.0),
                "train_s": sum(run[phase] for phase in train),
            },
            "bare": {"engine_s": bare["engine"], "reward_s": bare["reward"], "train_s": sum(bare[phase] for phase in train)},
            "overhead_share_of_each_repeat": self.repeat_shares(),
        }


def run_total(step: Mapping[str, float]) -> float:
    """`replica` is a part of `rollout`, not beside it."""
    return sum(seconds for name, seconds in step.items() if name != "replica")


def medians(steps: Sequence[Seconds]) -> Seconds:
    return {name: median(step[name] for step in steps) for name in steps[0]}


def table(measured: Measured) -> list[str]:
    """Where the difference lies. Medians of phases need not add up to the median of the step."""
    run, bare = measured.run(), measured.bare()
    rows = [(phase, run[phase], sum(bare[call] for call in ALONE.get(phase, ()))) for phase in run if phase != "replica"]
    at = [phase for phase, *_ in rows].index("rollout") + 1
    rows[at:at] = [
        ("  in the replica (against the engine)", run["replica"], bare["engine"]),
        ("  beyond it (pull, messages, scoring, journal)", run["rollout"] - run["replica"], bare["reward"]),
    ]
    rows.append(("step", measured.step_s, measured.bare_s))
    lines = [f"{measured.name}, milliseconds a step", f"{'phase':46} {'run':>9} {'alone':>9} {'added':>9}"]
    lines += [f"{name:46} {1e3 * r:9.1f} {1e3 * b:9.1f} {1e3 * (r - b):9.1f}" for name, r, b in rows]
    shares = ", ".join(f"{share:.1%}" for share in measured.repeat_shares())
    return [*lines, f"overhead {measured.overhead_share:.1%} of a step; by repeat: {shares}", ""]


def measure(name: str, config: Config, *, repeats: int, warmup: int) -> Measured:
    """Alternates runs of `config` with their bare sides. Steps up to `warmup` are left out on both."""
    from verst.runtime.launch import train

    measured = Measured(name, [], [])
    for repeat in range(repeats):
        one = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-{repeat}"})})
        path = train(one, echo=lambda line: None).path
        bare = bare_in_a_process(path, config.train.threads)
        measured = replace(measured, runs=[*measured.runs, run_steps(path)[warmup:]], bares=[*measured.bares, bare[warmup:]])
        print(f"{name}, repeat {repeat + 1} of {repeats}: overhead {measured.repeat_shares()[-1]:.1%}", flush=True)
    return measured


def quickstart(directory: Path, model: Path, steps: int) -> Config:
    """`examples/quickstart_grpo.yaml` without evaluation and with a checkpoint only at the end."""
    quiet = ["eval.every_steps=0", f"checkpoint.every_steps={steps}", "checkpoint.export_final=false"]
    where = [f"run.dir={directory}", "run.name=quickstart", f"run.steps={steps}", f"model.path={model}"]
    return load_config(ROOT / "examples" / "quickstart_grpo.yaml", where + quiet)


def smollm2(directory: Path, model: Path, steps: int) -> Config:
    """The same task in a small batch of longer answers; a learning rate that leaves a trained model whole."""
    sizes = ["train.groups_per_step=4", "rollout.group_size=4", "rollout.max_new_tokens=32", "rollout.max_running=16"]
    other = ["run.name=smollm2", "data.max_prompt_tokens=128", "train.lr=1e-6"]
    return load_config(resolved(quickstart(directory, model, steps)), sizes + other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="also measure this model, for 4 steps of 4 groups x 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of each run of the quickstart")
    parser.add_argument("--warmup", type=int, default=4, help="first steps of them that do not count")
    parser.add_argument("--bare", type=Path, metavar="RUN", help="measure the bare side of a finished run, in this process")
    options = parser.parse_args()
    if options.bare:
        bare_main(options.bare)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        config = quickstart(directory, build_tiny_model(directory / "model"), options.steps)
        small = measure("quickstart", config, repeats=options.repeats, warmup=options.warmup)
        large = None
        if options.smollm2:
            large = measure("smollm2", smollm2(directory, options.smollm2.absolute(), steps=4), repeats=1, warmup=1)
    for measured in (small, large):
        print("\n".join(table(measured)) if measured else "smollm2: not measured, because no --smollm2 DIR was given")
    shares = {"overhead_share": small.overhead_share, "overhead_share_smollm2": large.overhead_share if large else None}
    settings = {"cpus": os.cpu_count(), "torch": torch.__version__, "cuda": torch.cuda.is_available()}
    summaries = small.summary() | {"smollm2": large.summary() if large else None}
    print(json.dumps({"benchmark": "core_overhead"} | shares | summaries | settings))


if __name__ == "__main__":
    main()
