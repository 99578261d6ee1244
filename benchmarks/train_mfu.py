"""Model FLOPs utilisation and peak memory of training: whole steps of the real backends, on random weights of a real shape.

    python benchmarks/train_mfu.py [--shape 0.6b 1.7b] [--backend fsdp megatron] [--tokens 4096] [--microbatch 4] [--profile DIR]

A step is `load_batch`, `forward_backward` and `optimizer_step` of one GRPO update: forward, log-probabilities of every token in chunks,
loss, backward, gradient norm, clip, AdamW. `step_s` is the median after warm-up, `tok_s` the tokens that went through the model in a
second, `peak_gib` what torch's allocator held at most.

    mfu   = flops / (step_s · peak)                      peak: 989 TFLOP/s, dense bfloat16 of one H100 SXM
    flops = 6 · N · tokens + 6 · L · H · Σ T²            over sequences of T tokens; L layers, H = heads · head size

N counts the weights that are multiplied: those of the layers and of the output layer, not the embedding's look-up. This is PaLM's formula
(arXiv 2204.02311, appendix B: 6N + 12·L·H·T a token), of whose second term causal attention needs half. What is computed twice (chunked
log-probabilities, gradient checkpointing) counts once.

Every combination of shape and backend runs in a process of its own; one that fails is reported and the others still run. `--set` overrides
the run file and `--patch` a constant of a module, to compare variants. `--ragged` gives every sequence another length, as rollouts do.
`--profile` writes the 25 longest kernels of a step to DIR. The last line is one JSON object; times in seconds, memory in GiB. On a CPU
(shape tiny unless given) mfu is null.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verst.config.load import load_config
from verst.config.schema import Config
from verst.protocols import TrainBackend
from verst.testing import tiny_tokenizer
from verst.training.backends import make_backend
from verst.training.megatron import compat
from verst.types import Batch, Sample

PHASES = ("load_batch", "forward_backward", "optimizer_step")
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Qwen3: its config.json gives these sizes. Embedding and output layer are one matrix."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    head: int
    vocabulary: int

    @property
    def multiplied(self) -> int:
        """N: weights of the matrix products of one token."""
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    def flops(self, lengths: Sequence[int]) -> int:
        """Of one forward and backward over sequences of these lengths."""
        return 6 * self.multiplied * sum(lengths) + 6 * self.layers * self.heads * self.head * sum(length**2 for length in lengths)


SHAPES = {
    "0.6b": Shape(hidden=1024, intermediate=3072, layers=28, heads=16, groups=8, head=128, vocabulary=151936),
    "1.7b": Shape(hidden=2048, intermediate=6144, layers=28, heads=16, groups=8, head=128, vocabulary=151936),
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=4, groups=2, head=16, vocabulary=512),
}


def write_model(shape: Shape, directory: Path, longest: int) -> None:
    """A Hugging Face directory with random bfloat16 weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head,
        max_position_embeddings=max(longest + 1, 40960),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def run_file(options: argparse.Namespace) -> Config:
    """The defaults of a run, but for what is measured."""
    return load_config(
        {
            "run": {"steps": 10**6, "deterministic": options.deterministic},
            "model": {"path": options.model, "dtype": "bfloat16"},
            "data": {"max_prompt_tokens": 1},
            "rollout": {"max_new_tokens": options.tokens},
            "train": {
                "backend": options.backend[0],
                "microbatch_tokens": options.microbatch * (options.tokens + 1),
                "compile": options.compile,
            },
        },
        options.set,
    )


def batches(options: argparse.Namespace, vocabulary: int) -> Iterator[Batch]:
    """Random samples without end. A sample's last token predicts nothing and is no input, so it has one token more than inputs."""
    rng = np.random.default_rng(0)
    count = options.microbatch * options.microbatches
    for step in itertools.count(1):
        lengths = rng.integers(options.tokens // 2, options.tokens + 1, count) if options.ragged else [options.tokens] * count
        yield Batch(step, tuple(range(count)), tuple(random_sample(i, int(n) + 1, vocabulary, step, rng) for i, n in enumerate(lengths)))


def random_sample(index: int, length: int, vocabulary: int, step: int, rng: np.random.Generator) -> Sample:
    mask_T = np.arange(length) > 0
    return Sample(
        id=f"{index}/0",
        group=index,
        tokens_T=rng.integers(0, vocabulary, length, dtype=np.int32),
        loss_mask_T=mask_T,
        behaviour_logprobs_T=np.where(mask_T, -math.log(vocabulary), 0.0).astype(np.float32),
        versions_T=np.where(mask_T, step - 1, -1).astype(np.int32),
        reward=0.0,
    )


def timed_step(backend: TrainBackend, batch: Batch) -> dict[str, float]:
    """Seconds of each phase of a step, to the moment the device is done with it."""
    advantages = [1.0 if sample.group % 2 else -1.0 for sample in batch.samples]
    calls: tuple[Callable[[], Any], ...] = (
        lambda: backend.load_batch(batch),
        lambda: backend.forward_backward(0, advantages),
        lambda: backend.optimizer_step(0),
    )
    seconds = {}
    for phase, call in zip(PHASES, calls, strict=True):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[phase] = time.perf_counter() - started
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains one combination in this process."""
    cuda = torch.cuda.is_available()
    for patch in options.patch:
        apply(patch)
    if options.sdpa != "default":
        torch.backends.cuda.enable_flash_sdp(options.sdpa == "flash")
        torch.backends.cuda.enable_cudnn_sdp(options.sdpa == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    shape = SHAPES[options.shape[0]]
    started = time.perf_counter()
    backend = make_backend(run_file(options), rank=0, world=1, device=None)
    ready_s = time.perf_counter() - started
    source = batches(options, shape.vocabulary)
    started = time.perf_counter()
    timed_step(backend, next(source))
    first_step_s = time.perf_counter() - started
    for _ in range(options.warmup - 1):
        timed_step(backend, next(source))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps, flops, tokens = [], [], []
    for batch in itertools.islice(source, options.steps):
        lengths = [len(sample.tokens_T) - 1 for sample in batch.samples]
        steps.append(timed_step(backend, batch))
        flops.append(shape.flops(lengths))
        tokens.append(sum(lengths))
    totals = [sum(step.values()) for step in steps]
    result = {
        "mfu": median(f / t for f, t in zip(flops, totals, strict=True)) / (options.peak_tflops * 1e12) if cuda else None,
        "tok_s": median(n / t for n, t in zip(tokens, totals, strict=True)),
        "step_s": median(totals),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        "phases_s": {phase: median(step[phase] for step in steps) for phase in PHASES},
        "ready_s": ready_s,
        "first_step_s": first_step_s,
        "graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0),
    }
    if options.profile:
        write_profile(options, backend, next(source))
    return result


def apply(patch: str) -> None:
    """Replaces a constant: MODULE:NAME=VALUE, the value as JSON."""
    place, value = patch.split("=", 1)
    module, name = place.split(":", 1)
    if module.startswith("verst.training.megatron"):
        compat.require()  # before Megatron-Core is imported in any other way
    target = importlib.import_module(module)
    if not hasattr(target, name):
        raise SystemExit(f"--patch {patch}: {module} has no {name}")
    setattr(target, name, json.loads(value))


def write_profile(options: argparse.Namespace, backend: TrainBackend, batch: Batch) -> None:
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True) as profiler:
        timed_step(backend, batch)
    table = profiler.key_averages().table(
        sort_by="self_device_time_total" if cuda else "self_cpu_time_total", row_limit=25, max_name_column_width=100
    )
    options.profile.mkdir(parents=True, exist_ok=True)
    (options.profile / f"{name_of(options.shape[0], options.backend[0], options)}.txt").write_text(table)


def name_of(shape: str, backend: str, options: argparse.Namespace) -> str:
    return f"{shape}-{backend}-{options.name}"


def in_a_process(shape: str, backend: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The result of one combination, or what went wrong."""
    command = [sys.executable, __file__, *sys.argv[1:], "--shape", shape, "--backend", backend, "--model", str(model)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=options.deadline_s)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {options.deadline_s:g} s"}
    if options.profile:
        options.profile.mkdir(parents=True, exist_ok=True)
        (options.profile / f"{name_of(shape, backend, options)}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return {"error": lines[-1][:400]}
    return json.loads(done.stdout.splitlines()[-1])


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What a person reads."""
    head = f"{'shape':<6}{'backend':<10}{'MFU %':>7}{'tok/s':>10}{'step ms':>9}{'forward+backward':>18}{'optimizer':>11}{'GiB':>7}"
    lines = [f"{head}{'graphs':>8}"]
    for run in runs:
        start = f"{run['shape']:<6}{run['backend']:<10}"
        if "error" in run:
            lines.append(f"{start} failed: {run['error']}")
            continue
        mfu, peak = (f"{value:.1f}" if value is not None else "-" for value in (run["mfu"] and 100 * run["mfu"], run["peak_gib"]))
        phases = run["phases_s"]
        lines.append(
            f"{start}{mfu:>7}{run['tok_s']:>10,.0f}{1e3 * run['step_s']:>9.1f}{1e3 * phases['forward_backward']:>18.1f}"
            f"{1e3 * phases['optimizer_step']:>11.1f}{peak:>7}{run['graphs']:>8}"
        )
    return lines


def report(options: argparse.Namespace) -> None:
    runs = []
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as directory:
            write_model(SHAPES[shape], Path(directory), options.tokens)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            runs += [{"shape": shape, "backend": b} | in_a_process(shape, b, Path(directory), options) for b in options.backend]
    print("\n".join(table(runs)))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    hidden = ("shape", "backend", "model", "profile")
    settings = {name: value for name, value in vars(options).items() if name not in hidden}
    print(json.dumps({"benchmark": "train_mfu", "device": device, "torch": torch.__version__} | settings | {"runs": runs}))


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["0.6b", "1.7b"] if cuda else ["tiny"])
    parser.add_argument("--backend", nargs="+", choices=["fsdp", "megatron"], default=["fsdp", "megatron"])
    parser.add_argument("--tokens", type=int, default=4096 if cuda else 64, help="inputs of each sequence")
    parser.add_argument("--microbatch", type=int, default=4, help="sequences of one forward")
    parser.add_argument("--microbatches", type=int, default=1, help="forwards of one step")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="train.compile")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=False, help="run.deterministic")
    parser.add_argument("--sdpa", choices=["default", "flash", "cudnn"], default="default", help="PyTorch's attention kernel")
    parser.add_argument("--ragged", action="store_true", help="lengths between half of --tokens and --tokens, others in each step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the run file")
    parser.add_argument("--patch", action="append", default=[], metavar="MODULE:NAME=JSON", help="replace a constant")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write the longest kernels and the processes' output there")
    parser.add_argument("--name", default="run", help="of this variant, in the names of those files")
    parser.add_argument("--deadline-s", type=float, default=900.0, help="limit of one combination")
    parser.add_argument("--model", help="measure one combination of this directory in this process")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    if options.model:
        print(json.dumps(measure(options)))
    else:
        report(options)


if __name__ == "__main__":
    main()
