"""What replaying the engine's expert routes in training (R3, arXiv 2510.11370) changes: mismatch, routes, reward and time.

    python benchmarks/r3_ablation.py [--size cpu|softmax|gpu] [--seeds 3] [--steps 30] [--updates 1 4] [--jobs 1] [--out runs/r3_ablation]

A Mixture-of-Experts model made from scratch learns the quickstart's task by supervised fine-tuning, routes of its own and all in float32.
Routers choose by sigmoids whose weights are then scaled, as those of DeepSeek-V3, Kimi K2 and GLM-4.5 do, or by softmax (`--size
softmax`), as Qwen3's; `SIZES` says how many experts there are. Then GRPO goes on from there with an engine that computes in bfloat16 and
a trainer that computes in float32: that is the mismatch of numbers, always the same, to which routers answer by choosing other experts.
Each arm has its own weights, data order and random numbers by its seed:

    record    routes are recorded and compared; the trainer's router chooses by itself   (R3 off)
    replay    the recorded experts are used                                              (R3 on)
    shifted   the experts recorded for the token before are used                         (a control: it must be worse)

each with one optimizer update a step and with several (minibatches). The mismatch is measured before a step's first update, at the
version that sampled the tokens. The time of a step is compared apart, `replay` against `ignore` (nothing recorded), step by step in turn.

- `kl_ratio`: KL of `record` over that of `replay` (mean of the k3 estimate, nats a token), `shifted_kl_ratio`: `shifted` over `replay`
- `route_agreement`: share of (token, layer) whose experts, as the dispatcher got them, are the recorded ones, in `replay`
- `overhead_share`: median step time with recording and replay over that without, minus 1

Tables and plots (`mismatch.png`, `reward.png`) go to `--out`; the last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verst.config.load import load_config
from verst.data.sources import open_source
from verst.data.stream import PromptStream
from verst.journal.codec import decode_group
from verst.observe.metrics import Tally
from verst.recipes.tiny import build_tiny_model, write_demonstrations
from verst.runtime.batching import advantages, assemble, describe
from verst.runtime.extensions import Extensions
from verst.runtime.rollout_worker import RolloutWorker
from verst.training.fsdp import FsdpBackend
from verst.types import Batch, Group, Routes, Sample
from verst.weights.files import publish

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("record", "replay", "shifted")
COLOURS = {"record": "tab:red", "replay": "tab:blue", "shifted": "tab:gray"}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"routing": "sigmoid", "hidden": 64, "layers": 4, "experts": 32, "chosen": 4, "expert_width": 32, "groups": 16, "sft_steps": 60},
    "softmax": {
        "routing": "softmax",
        "hidden": 64,
        "layers": 3,
        "experts": 16,
        "chosen": 4,
        "expert_width": 32,
        "groups": 16,
        "sft_steps": 100,
    },
    "gpu": {
        "routing": "sigmoid",
        "hidden": 256,
        "layers": 8,
        "experts": 64,
        "chosen": 8,
        "expert_width": 128,
        "groups": 24,
        "sft_steps": 200,
    },
}


def build_model(directory: Path, size: dict[str, Any]) -> Path:
    """A random Mixture-of-Experts model beside the tokenizer of the quickstart."""
    from transformers import AutoConfig, Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    build_tiny_model(directory, hidden=64)
    dense = AutoConfig.from_pretrained(directory)
    hidden, heads = size["hidden"], size["hidden"] // 16
    options: dict[str, Any] = {
        "vocab_size": dense.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": size["expert_width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 16,
        "num_experts_per_tok": size["chosen"],
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": hidden**-0.5,
        "bos_token_id": None,
        "eos_token_id": dense.eos_token_id,
        "pad_token_id": dense.pad_token_id,
    }
    torch.manual_seed(0)
    if size["routing"] == "softmax":
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, num_experts=size["experts"]))
    else:
        groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**options, **groups, n_routed_experts=size["experts"]))
    model.save_pretrained(directory)
    return directory


def taught(scratch: Path, size: dict[str, Any]) -> Path:
    """The model after supervised fine-tuning, by an ordinary run."""
    import verst

    model, file = build_model(scratch / "model", size), write_demonstrations(scratch / "demonstrations.jsonl")
    steps = size["sft_steps"]
    options = [f"run.dir={scratch}", f"model.path={model}", f"data.path={file}", f"run.steps={steps}", f"checkpoint.every_steps={steps}"]
    lr = 0.01 if size["hidden"] <= 64 else 1e-3
    return verst.train(ROOT / "examples" / "quickstart_sft.yaml", overrides=[*options, f"train.lr={lr}"], echo=lambda line: None).model


# ---- one arm


@dataclass
class Arm:
    """One reinforcement-learning run with its metrics, step by step."""

    routes: str
    updates: int
    seed: int
    rows: list[dict[str, float]] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


class Run:
    """Engine and trainer of one arm in this process: the parts of a real run without its loop, which takes one type for both."""

    def __init__(self, arm: Arm, model: Path, size: dict[str, Any], steps: int, scratch: Path, device: str) -> None:
        self._arm, self._scratch = arm, scratch
        options = [f"run.dir={scratch}", f"run.seed={arm.seed}", f"run.steps={steps}", f"model.path={model}", "eval.every_steps=0"]
        sizes = [f"train.groups_per_step={size['groups']}", f"train.minibatches={arm.updates}", "run.deterministic=false"]
        lr = 0.003 if size["hidden"] <= 64 else 1e-4
        routes = "replay" if arm.routes == "shifted" else arm.routes
        learning = [f"train.lr={lr / arm.updates}", f"train.routes={routes}"]
        self._config = load_config(ROOT / "examples" / "quickstart_grpo.yaml", [*options, *sizes, *learning])
        engine = self._config.model_copy(update={"model": self._config.model.model_copy(update={"dtype": "bfloat16"})})
        self._rollout = RolloutWorker(engine, Extensions(), 0, device, scratch)
        self._backend = FsdpBackend(self._config, rank=0, world=1, device=device)
        data = self._config.data
        self._stream = PromptStream(open_source(data, None), data, seed=arm.seed, split="train")
        self._seq = 0
        self._weights = Path(tempfile.mkdtemp(dir=scratch))
        self._probe_T = np.zeros(2, np.int32)

    async def start(self) -> None:
        await self._rollout.start(True)
        await self._publish(0)

    async def close(self) -> None:
        await self._rollout.close()

    async def step(self, number: int) -> None:
        """Rolls, trains and publishes; appends the step's metrics to the arm. `step_s` covers rollout and training."""
        begun = time.perf_counter()
        prompts = [(self._seq + i, self._stream.next()) for i in range(self._config.train.groups_per_step)]
        self._seq += len(prompts)
        encoded = await asyncio.gather(*(self._rollout.roll(seq, prompt, "policy") for seq, prompt in prompts))
        groups = [decode_group(group) for group in encoded]
        metrics = self._train(number, groups)
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        seconds = time.perf_counter() - begun
        await self._publish(number)
        self._arm.rows.append(metrics | {"step_s": seconds})

    def _train(self, number: int, groups: Sequence[Group]) -> dict[str, float]:
        batch = assemble(number, groups, self._config.algorithm)
        if self._arm.routes == "shifted":
            batch = shifted(batch)
        tally = Tally()
        scores = self._backend.load_batch(batch)
        tally.merge(scores.tally)
        values = advantages(batch, self._config, scores.reference_kl)
        for update in range(self._backend.num_updates):
            tally.merge(self._backend.forward_backward(update, values))
            tally.merge(self._backend.optimizer_step(update))
        return tally.report() | describe(groups, values, number - 1)

    async def _publish(self, version: int) -> None:
        """The trainer's weights, rounded, in a file of their own."""
        for old in self._weights.iterdir():
            old.unlink()
        kept = "e_score_correction_bias"  # adds to the scores that choose experts, and is float32 in every type of model
        rounded = ((n, tensor if n.endswith(kept) else tensor.to(torch.bfloat16)) for n, tensor in self._backend.weights())
        await self._rollout.pull(publish(version, rounded, self._weights), self._probe_T)


def shifted(batch: Batch) -> Batch:
    """Every token gets the experts recorded for the one before it."""

    def moved(sample: Sample) -> Sample:
        assert sample.routes is not None
        return replace(sample, routes=Routes(np.roll(sample.routes.experts_TLK, 1, axis=0), sample.routes.digest))

    return replace(batch, samples=tuple(moved(sample) for sample in batch.samples))


async def train_arm(arm: Arm, model: Path, size: dict[str, Any], steps: int, scratch: Path, device: str) -> Arm:
    torch.set_num_threads(1)
    run = Run(arm, model, size, steps, scratch, device)
    await run.start()
    try:
        for number in range(1, steps + 1):
            await run.step(number)
    finally:
        await run.close()
    return arm


async def time_arms(model: Path, size: dict[str, Any], steps: int, scratch: Path, device: str) -> dict[str, float]:
    """Median seconds of a step without routes and with replay, the two in turn."""
    arms = {name: Arm(name, 1, seed=0) for name in ("ignore", "replay")}
    runs = {name: Run(arm, model, size, steps, scratch, device) for name, arm in arms.items()}
    for run in runs.values():
        await run.start()
    try:
        for number in range(1, steps + 1):
            for run in runs.values():
                await run.step(number)
    finally:
        for run in runs.values():
            await run.close()
    warm = min(3, steps - 1)
    return {name: median(arm.values("step_s")[warm:]) for name, arm in arms.items()}


# ---- what came out


@dataclass(frozen=True)
class Summary:
    """All seeds of one arm."""

    arms: Sequence[Arm]

    def mean(self, name: str) -> float:
        return mean(value for arm in self.arms for value in arm.values(name))

    def by_seed(self, name: str) -> list[float]:
        return [mean(arm.values(name)) for arm in self.arms]

    def last(self, name: str, steps: int = 5) -> float:
        return mean(value for arm in self.arms for value in arm.values(name)[-steps:])

    def course(self, name: str) -> list[float]:
        return [mean(values) for values in zip(*(arm.values(name) for arm in self.arms), strict=True)]


def table(results: dict[tuple[int, str], Summary]) -> Iterator[str]:
    yield f"{'updates':>7} {'arm':8} {'KL k3':>10} {'by seed':>32} {'max |d|':>8} {'differ':>7} {'replayed':>8} {'reward':>7} {'(end)':>6}"
    for (updates, arm), found in results.items():
        seeds = " ".join(f"{value:.1e}" for value in found.by_seed("mismatch/k3"))
        values = (found.mean("mismatch/k3"), found.mean("mismatch/abs_max"), found.mean("routes/differ"), found.mean("routes/replayed"))
        kl, largest, differ, replayed = values
        reward, end = found.mean("reward"), found.last("reward")
        yield f"{updates:7} {arm:8} {kl:10.2e} {seeds:>32} {largest:8.3f} {differ:7.2%} {replayed:8.2%} {reward:7.3f} {end:6.3f}"


def plot(results: dict[tuple[int, str], Summary], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for name, title, scale in (("mismatch/k3", "KL(engine ‖ trainer), nats a token", "log"), ("reward", "mean reward", "linear")):
        numbers = sorted({updates for updates, _ in results})
        figure, axes = plt.subplots(1, len(numbers), figsize=(5 * len(numbers), 3.4), sharey=True, squeeze=False)
        for axis, updates in zip(axes[0], numbers, strict=True):
            for arm in ARMS:
                course = results[updates, arm].course(name)
                axis.plot(range(1, len(course) + 1), course, label=arm, color=COLOURS[arm])
            axis.set(title=f"{updates} update{'s' * (updates > 1)} a step", xlabel="step", yscale=scale)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(title)
        axes[0][-1].legend()
        figure.tight_layout()
        figure.savefig(out / f"{name.split('/')[0]}.png", dpi=120)
        plt.close(figure)


def report(results: dict[tuple[int, str], Summary], times: dict[str, float]) -> dict[str, Any]:
    def kl(arm: str) -> float:
        return mean(found.mean("mismatch/k3") for (_, name), found in results.items() if name == arm)

    replays = [found for (_, name), found in results.items() if name == "replay"]
    return {
        "benchmark": "r3_ablation",
        "kl_ratio": kl("record") / kl("replay"),
        "kl": {f"{arm}, {updates} updates": found.mean("mismatch/k3") for (updates, arm), found in results.items()},
        "route_agreement": mean(found.mean("routes/replayed") for found in replays),
        "routes_differ_without": mean(found.mean("routes/differ") for (_, name), found in results.items() if name == "record"),
        "shifted_kl_ratio": kl("shifted") / kl("replay"),
        "overhead_share": times["replay"] / times["ignore"] - 1,
        "step_s": times,
        "bytes_per_token": replays[0].mean("routes/bytes_per_token"),
    }


async def measure(options: argparse.Namespace, scratch: Path) -> tuple[dict[tuple[int, str], Summary], dict[str, float]]:
    size, device = SIZES[options.size], "cuda" if torch.cuda.is_available() else "cpu"
    model = taught(scratch, size)
    times = await time_arms(model, size, options.timed, scratch, device)
    arms = [Arm(routes, updates, seed) for updates in options.updates for routes in ARMS for seed in range(options.seeds)]
    given = (model, size, options.steps, scratch, device)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        under_way = [pool.submit(_in_a_process, arm, given) for arm in arms]
        for done in as_completed(under_way):
            arm = done.result()
            print(f"{arm.updates} updates, {arm.routes}, seed {arm.seed}: KL {mean(arm.values('mismatch/k3')):.2e}", flush=True)
        trained = [done.result() for done in under_way]
    results = {(u, r): Summary([a for a in trained if (a.updates, a.routes) == (u, r)]) for u in options.updates for r in ARMS}
    return results, times


def _in_a_process(arm: Arm, given: tuple[Path, dict[str, Any], int, Path, str]) -> Arm:
    return asyncio.run(train_arm(arm, *given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of reinforcement learning in each arm")
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 4], help="optimizer updates a step, each measured apart")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; those whose time is compared have the machine for themselves")
    parser.add_argument("--timed", type=int, default=15, help="steps whose time is compared")
    parser.add_argument("--out", type=Path, default=Path("runs/r3_ablation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        results, times = asyncio.run(measure(options, Path(scratch)))
    lines = [*table(results), ""]
    print("\n".join(lines))
    (options.out / "table.txt").write_text("\n".join(lines))
    rows = [{"arm": arm.routes, "updates": arm.updates, "seed": arm.seed, "rows": arm.rows} for s in results.values() for arm in s.arms]
    (options.out / "steps.json").write_text(json.dumps(rows))
    plot(results, options.out)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    settings = {"size": options.size, "seeds": options.seeds, "steps": options.steps, "device": device, "torch": torch.__version__}
    found = json.dumps(report(results, times) | SIZES[options.size] | settings)
    (options.out / "result.json").write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
