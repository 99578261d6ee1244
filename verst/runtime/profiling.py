"""One journaled step trained again under PyTorch's profiler: where its time and its memory go.

Needs neither engine nor cluster: the checkpoint before the step is restored in this process, the journaled steps between are trained again,
and then the step itself. The weights must come out as they were committed, so what is profiled is what happened.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.config.schema import Config
from verst.errors import ConfigError, JournalError
from verst.journal.log import JournalReader
from verst.runtime import batching
from verst.runtime.rundir import RunDirectory
from verst.runtime.standalone import rank_here
from verst.runtime.stored import newest_state
from verst.runtime.trainers import Trainers
from verst.runtime.training_step import journaled_groups, train_batch, weights_digest

if TYPE_CHECKING:
    from torch.profiler import profile

_TOP = 12
_ALLOCATIONS = 200_000  # of the CUDA allocator that are remembered


@dataclass(frozen=True, slots=True)
class Operator:
    """One kind of operation: how often it ran, its own seconds (on the GPU, if there is one), and the bytes it took and kept."""

    name: str
    calls: int
    self_s: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Profiled:
    """What was written and found. `begun_from`, in words, is what was restored.

    `same_weights`: the committed hash came out; None: the step was never committed.
    """

    step: int
    begun_from: str
    trace: Path
    memory: Path | None
    operators_file: Path
    phases_s: dict[str, float]
    operators: tuple[Operator, ...]
    same_weights: bool | None


def profile_step(path: str | Path, step: int, out: str | Path, *, device: str) -> Profiled:
    """Trains one journaled step of a run again, on one rank in this process, and writes to the new directory `out`:

    `trace.json`, a Chrome trace; `operators.txt`, all operations; `memory.pickle`, the allocator's history (CUDA only).

    Raises:
        ConfigError: the run has several trainer ranks, or `out` exists.
        JournalError: the journal has no batch of that step.
        CheckpointError: a checkpoint is of another model.
    """
    run, config = RunDirectory.open(path)
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already: give another --out")
    _require_one_rank(run, config)
    journal = JournalReader(run.journal, run.run_id)
    if step not in journal.index.batches:
        last = journal.index.last_batch
        there = f"it has those of steps 1 to {last}" if last else "no step has begun"
        raise JournalError(f"{run.root}: the journal has no batch of step {step}; {there}")
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}): give another --out") from error
    return asyncio.run(_profile(run, config, journal, step, out, device))


def _require_one_rank(run: RunDirectory, config: Config) -> None:
    if config.train.ranks > 1:
        raise ConfigError(
            f"{run.root} has train.ranks {config.train.ranks}: a step is profiled in this process, on one rank, and what ranks say to each "
            "other would be missing. To see one rank alone, copy the run, bring the copy to one rank (verst resume COPY train.ranks=1, and "
            "null for Megatron's parallel sizes) and profile the copy"
        )


async def _profile(run: RunDirectory, config: Config, journal: JournalReader, step: int, out: Path, device: str) -> Profiled:
    checkpoint, _ = await asyncio.to_thread(newest_state, run, step - 1)
    restored, begun_from = 0, "the initial model"
    if checkpoint is not None:
        restored = checkpoint.step
        begun_from = f"the checkpoint of step {restored}" if restored else "the checkpoint that the run began from"
    async with rank_here(config, device) as trainers:
        if checkpoint is not None:
            await trainers.restore(str(checkpoint.path.parent), checkpoint.step)
        for earlier in range(restored + 1, step):
            await _train(trainers, config, journal, earlier)
        with _recording_memory(device, out / "memory.pickle") as memory, _profiler(device) as profiler:
            phases = await _train(trainers, config, journal, step)
        digest = await weights_digest(trainers, step)
    profiler.export_chrome_trace(str(out / "trace.json"))
    operators = _operators(profiler, device)
    (out / "operators.txt").write_text(_operator_text(operators), encoding="utf-8")
    committed = journal.commit(step).digest if step in journal.index.commits else None
    same = None if committed is None else committed == digest
    return Profiled(step, begun_from, out / "trace.json", memory, out / "operators.txt", phases, tuple(operators[:_TOP]), same)


async def _train(trainers: Trainers, config: Config, journal: JournalReader, step: int) -> dict[str, float]:
    """The trainers' part of a step. Returns the seconds of each phase, which the trace shows under the same names."""
    seconds: dict[str, float] = {}
    groups = journaled_groups(journal, step, trainers.routed_experts)
    batch = batching.assemble(step, groups, config.algorithm)
    await train_batch(trainers, batch, config, lambda name: _phase(name, seconds))
    return seconds


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    from torch.profiler import record_function

    began = time.perf_counter()
    with record_function(f"verst/{name}"):
        yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def _profiler(device: str) -> profile:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    return profile(activities=activities, record_shapes=True, profile_memory=True)


@contextmanager
def _recording_memory(device: str, file: Path) -> Iterator[Path | None]:
    """Remembers what CUDA's allocator does meanwhile, and writes it. Yields None on a CPU, whose allocator remembers nothing."""
    if not device.startswith("cuda"):
        yield None
        return
    import torch

    memory: Any = torch.cuda.memory
    memory._record_memory_history(max_entries=_ALLOCATIONS)
    try:
        yield file
        memory._dump_snapshot(str(file))
    finally:
        memory._record_memory_history(enabled=None)


def _operators(profiler: profile, device: str) -> list[Operator]:
    """All operations, those that took longest by themselves first."""
    on_gpu = device.startswith("cuda")
    found = [
        Operator(
            e.key,
            e.count,
            (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6,
            e.self_device_memory_usage if on_gpu else e.self_cpu_memory_usage,
        )
        for e in profiler.key_averages()
        if not e.key.startswith("verst/")
    ]
    return sorted(found, key=lambda operator: operator.self_s, reverse=True)


def _operator_text(operators: Sequence[Operator]) -> str:
    lines = [f"{'self ms':>10} {'calls':>8} {'MiB kept':>10}  operation"]
    lines += [f"{1e3 * o.self_s:10.3f} {o.calls:8} {o.nbytes / (1 << 20):10.2f}  {o.name}" for o in operators]
    return "\n".join(lines) + "\n"
