"""Weights from a trainer to an SGLang server by process group: speed of the transfer, and the time engines stand still for it.

    python benchmarks/weight_sync.py [--shape 1.7b] [--backend megatron] [--engine sglang] [--transport group] [--repeats 8]

With two GPUs the trainer has the first, the server the second (NCCL); with one they share it (`--transport shared`: CUDA IPC); without,
all is on CPUs (gloo). Parts and calls are a run's: `TrainerWorker` publishes and sends, an engine pauses, receives, verifies every tensor
and resumes, then both score the probe; there is no Ray. Before each push one optimizer step changes the weights.

    sync_gb_s   bytes of a version / seconds in which the engine's ranks receive it, copy it into the model and hash it; for the hf engine
                seconds for which it stands still
    link_gb_s   bytes / seconds of bare broadcasts of 512 MiB between the same devices, in this run (null if they share one)
    share       sync_gb_s / link_gb_s
    pause_ms    from the end of the optimizer step to the first token that may be used: of a request that the engine answers with the
                verified version, once the probe was compared
    stopped_ms  for how long the engine stands still

Each is a median over the pushes after `--warmup`. `phases_ms` has the parts of `pause_ms`: hash (`publish`), a record on disk (`commit`),
the push until the engine runs again (`stopped`), and from then on, side by side, its first token, its probe and the trainer's. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import itertools
import json
import multiprocessing
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_mfu import SHAPES, random_sample, write_model
from verst.config.load import load_config
from verst.config.schema import Config
from verst.journal.codec import encode_batch
from verst.protocols import Engine
from verst.rollout.engines import make_engine
from verst.runtime.trainer_worker import GROUP, TrainerWorker
from verst.types import Batch, GenerateRequest, Manifest, Sampling
from verst.weights.group import GroupAddress, GroupUpdate, Member, enter, join, open_store
from verst.weights.layout import BUCKET_BYTES
from verst.weights.push import check_probe, compare_probe, push

DEADLINE_S = 120.0
PROBE_TOKENS = 64
LINK_REPEATS = 12


def run_file(options: argparse.Namespace, directory: Path) -> Config:
    on_gpu = torch.cuda.is_available()
    server: dict[str, Any] = {"base_gpu_id": 1} if torch.cuda.device_count() > 1 else {}
    server |= {"mem_fraction_static": 0.3 if options.transport == "shared" else 0.5} if on_gpu else {}
    server |= {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.sglang)}
    return load_config(
        {
            "run": {"dir": str(directory), "steps": 10**6, "deterministic": False},
            "model": {"path": str(directory / "model"), "dtype": "bfloat16" if on_gpu else "float32"},
            "data": {"max_prompt_tokens": 256},
            "rollout": {"engine": options.engine, "max_new_tokens": 64, "max_running": 32}
            | ({"sglang": server} if options.engine == "sglang" and server else {}),
            "train": {"backend": options.backend, "lr": 1e-4, "microbatch_tokens": 512, "compile": options.compile},
            "weights": {"transport": options.transport, "deadline_s": DEADLINE_S, "probe_limit": 1.0},
        }
    )


class Sync:
    """One trainer, one engine, and the group between them."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.config = run_file(options, directory)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.trainer = TrainerWorker(self.config, 0, device)
        self.engine: Engine = make_engine(self.config, slot=0, device=device, shared=False, log=directory / "server.log")
        self._address: GroupAddress | None = None
        self._records = (directory / "commits").open("wb", buffering=0)
        self._shared = options.transport == "shared"
        self._vocabulary = SHAPES[options.shape].vocabulary
        self._rng = np.random.default_rng(0)
        self.probe_T = self._rng.integers(0, self._vocabulary, PROBE_TOKENS, dtype=np.int32)

    async def open(self) -> None:
        await self.engine.start()
        await asyncio.to_thread(self.trainer.start, None)
        self._address = self.trainer.host_group("weight_sync/0", 1 + self.engine.weight_ranks, self._shared)

    def update(self, version: int) -> None:
        """One optimizer step, so that every version differs from the one before."""
        backend = self.trainer.backend
        samples = tuple(random_sample(i, 256, self._vocabulary, version, self._rng) for i in range(2))
        self.trainer.load_batch(encode_batch(Batch(version, (0, 1), samples)), None)
        for update in range(backend.num_updates):
            backend.forward_backward(update, [1.0, -1.0])
            backend.optimizer_step(update)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    async def push(self, version: int, profile: cProfile.Profile | None) -> dict[str, float]:
        """Seconds of each phase from the end of the optimizer step to the first token of the new version."""
        times = {"start": time.perf_counter()}
        with profile or contextlib.nullcontext():
            published = self.trainer.publish(version, GROUP, self.probe_T)
        if profile:
            pstats.Stats(profile).sort_stats("cumulative").print_stats(30)
        assert published is not None
        manifest = published.manifest
        times["publish"] = time.perf_counter()
        self._commit(manifest)
        times["commit"] = time.perf_counter()
        sending = asyncio.create_task(self._send(manifest, times))
        if self._address is not None:  # the group is formed with the first version, which is a warm-up
            await self.engine.join_weight_group(self._address, 1, DEADLINE_S)
            self._address = None
        update = GroupUpdate(manifest, BUCKET_BYTES, DEADLINE_S)
        await push(self.engine, update, deadline_s=DEADLINE_S)
        times["stopped"] = time.perf_counter()
        engine_T, _ = await asyncio.gather(self._engine_probe(times), self._first_token(version, times))
        difference = compare_probe(await sending, engine_T)
        check_probe(difference, self.config.probe_limit, version)
        times["pause"] = time.perf_counter()
        nbytes = sum(entry.nbytes for entry in manifest.entries)
        stats = self.engine.stats()
        received = {f"{name}_s": stats[f"weights_{name}_s"] for name in ("receive", "load") if f"weights_{name}_s" in stats}
        return phases(times) | received | {"nbytes": float(nbytes), "difference": difference}

    async def _first_token(self, version: int, times: dict[str, float]) -> None:
        request = GenerateRequest(f"first/{version}", self.probe_T[:16], Sampling(max_new_tokens=1), 0)
        generation = await self.engine.generate(request)
        if generation.versions_T.tolist() != [version]:
            raise SystemExit(f"the first token after the push is of version {generation.versions_T.tolist()}, not {version}")
        times["first_token"] = time.perf_counter()

    async def _engine_probe(self, times: dict[str, float]) -> NDArray[np.float32]:
        logprobs_T = await self.engine.logprobs(self.probe_T)
        times["engine_probe"] = time.perf_counter()
        return logprobs_T

    def _commit(self, manifest: Manifest) -> None:
        """What a commit costs: a record on disk."""
        self._records.write(f"{manifest.version} {manifest.digest}\n".encode())
        os.fsync(self._records.fileno())

    async def _send(self, manifest: Manifest, times: dict[str, float]) -> NDArray[np.float32]:
        """The trainer's half: the broadcast and its probe."""
        logprobs_T = await asyncio.to_thread(self.trainer.send, manifest, self.probe_T, self._address)
        times["sent_and_probed"] = time.perf_counter()
        return logprobs_T

    async def close(self) -> None:
        await self.engine.close()
        self.trainer.close()
        self._records.close()


def phases(times: dict[str, float]) -> dict[str, float]:
    """Seconds: of what comes one after the other, and of what begins with the commit (the trainer) or the resumption (the engine)."""
    found = {f"{name}_s": times[name] - times[before] for before, name in itertools.pairwise(("start", "publish", "commit", "stopped"))}
    found |= {f"{name}_s": times[name] - times["stopped"] for name in ("first_token", "engine_probe")}
    return found | {"sent_and_probed_s": times["sent_and_probed"] - times["commit"], "pause_s": times["pause"] - times["start"]}


# ---- the link


def link(nbytes: int) -> float:
    """Bytes a second of bare broadcasts from this process to another on the second device, `LINK_REPEATS` after two of warm-up."""
    store = open_store("127.0.0.1", timeout_s=DEADLINE_S, listen=True)
    address = GroupAddress("127.0.0.1", store.port, "link/0", 2)
    receiver = multiprocessing.get_context("spawn").Process(target=_receive_all, args=(address, nbytes), daemon=True)
    receiver.start()
    try:
        member = enter(store, address, 0, device="cuda:0" if torch.cuda.is_available() else "cpu", timeout_s=DEADLINE_S)
        return nbytes / median(_broadcasts(member, nbytes)[2:])
    finally:
        receiver.join(DEADLINE_S)


def _receive_all(address: GroupAddress, nbytes: int) -> None:
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda:1"
        torch.cuda.set_device(1)
    _broadcasts(join(address, 1, device=device, timeout_s=DEADLINE_S), nbytes)


def _broadcasts(member: Member, nbytes: int) -> list[float]:
    deadline = time.monotonic() + DEADLINE_S
    buffer = torch.zeros(nbytes, dtype=torch.uint8, device=member.device)
    seconds = []
    for _ in range(2 + LINK_REPEATS):
        start = time.perf_counter()
        member.finish(member.broadcast(buffer, deadline), deadline, "a bare broadcast")
        if member.device.type == "cuda":
            torch.cuda.synchronize(member.device)
        seconds.append(time.perf_counter() - start)
    return seconds


# ---- main


async def measure(options: argparse.Namespace, directory: Path) -> list[dict[str, float]]:
    sync = Sync(options, directory)
    pushes = []
    try:
        await sync.open()
        for version in range(1, options.warmup + options.repeats + 1):
            await asyncio.to_thread(sync.update, version)
            profile = cProfile.Profile() if options.profile and version == options.warmup + options.repeats else None
            pushes.append(await sync.push(version, profile))
            print(f"version {version}: " + ", ".join(f"{name} {value:.4g}" for name, value in pushes[-1].items()), flush=True)
    finally:
        await sync.close()
    return pushes[options.warmup :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--backend", choices=("fsdp", "megatron"), default="megatron")
    parser.add_argument("--engine", choices=("hf", "sglang"), default="sglang")
    parser.add_argument("--transport", choices=("group", "shared"), default="shared" if torch.cuda.device_count() == 1 else "group")
    parser.add_argument("--repeats", type=int, default=8, help="pushes that count")
    parser.add_argument("--warmup", type=int, default=2, help="pushes before them; the first one goes through the model's own loader")
    parser.add_argument("--sglang", action="append", default=[], metavar="NAME=JSON", help="argument of SGLang's server")
    parser.add_argument("--compile", action="store_true", help="train.compile")
    parser.add_argument("--profile", action="store_true", help="print where the time of the last publish goes in the trainer")
    parser.add_argument("--link-bytes", type=int, default=BUCKET_BYTES if torch.cuda.is_available() else 64 << 20)
    options = parser.parse_args()
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as in a run (verst.runtime.launch.worker_env)
    with tempfile.TemporaryDirectory(prefix="weight_sync-") as scratch:
        directory = Path(scratch)
        write_model(SHAPES[options.shape], directory / "model", 1024)
        link_s = None if options.transport == "shared" else link(options.link_bytes)
        pushes = asyncio.run(measure(options, directory))
    middle = {name: median(push[name] for push in pushes) for name in pushes[0]}
    sync_s = middle["nbytes"] / middle.get("receive_s", middle["stopped_s"])
    print(
        json.dumps(
            {
                "benchmark": "weight_sync",
                "sync_gb_s": sync_s / 1e9,
                "link_gb_s": link_s and link_s / 1e9,
                "share": link_s and sync_s / link_s,
                "pause_ms": 1e3 * middle["pause_s"],
                "stopped_ms": 1e3 * middle["stopped_s"],
                "phases_ms": {name.removesuffix("_s"): 1e3 * middle[name] for name in middle if name.endswith("_s")},
                "gib": middle["nbytes"] / 2**30,
                "probe_difference": max(push["difference"] for push in pushes),
                "shape": options.shape,
                "backend": options.backend,
                "engine": options.engine,
                "transport": options.transport,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
