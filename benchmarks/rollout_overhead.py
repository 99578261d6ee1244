"""Generation through Verst against SGLang's own speed: the same server, prompts, lengths and sampling.

    python benchmarks/rollout_overhead.py [--shape 0.6b] [--groups 32] [--group-size 8] [--prompt 128] [--new 512] [--repeats 3]

Through Verst: `RolloutWorker.roll` of all groups at once, as a run's replica does it: chat rendering, environment, generation with
log-probabilities and versions, text decoding, scoring in reward processes, encoding of the finished group. Only Ray's message is left out.
SGLang's own: the same token ids and limits sent straight to its HTTP interface, log-probabilities returned, once as one batch request and
once as one request for each completion; the faster of the two counts.

    ratio = tokens/s through Verst / tokens/s of SGLang's own      medians of alternating repeats after one of warm-up

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_mfu import SHAPES, write_model
from verst.config.load import load_config
from verst.config.schema import Config
from verst.journal.codec import decode_group
from verst.runtime.extensions import Extensions
from verst.runtime.rollout_worker import RolloutWorker
from verst.types import Group, Message, Prompt

DEADLINE_S = 600.0
REWARDS = 2


def constant(trajectory: Any, fields: Any) -> float:
    """A reward that costs nothing itself."""
    return 1.0


def run_file(options: argparse.Namespace, directory: Path) -> Config:
    on_gpu = torch.cuda.is_available()
    server = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.sglang)}
    return load_config(
        {
            "run": {"dir": str(directory), "steps": 1, "deterministic": False},
            "model": {"path": str(directory / "model"), "dtype": "bfloat16" if on_gpu else "float32"},
            "data": {"max_prompt_tokens": options.prompt + 64},
            "rollout": {
                "engine": "sglang",
                "group_size": options.group_size,
                "max_new_tokens": options.new,
                "max_running": options.groups * options.group_size,
                "deadline_s": DEADLINE_S,
            }
            | ({"sglang": server} if server else {}),
            "reward": {"function": "benchmarks.rollout_overhead:constant", "workers": REWARDS},
            "train": {"groups_per_step": options.groups},
        }
    )


def prompts(options: argparse.Namespace) -> list[Prompt]:
    """One byte is one token of the model's tokenizer."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh 0123"), options.prompt)) for _ in range(options.groups)]
    return [Prompt(f"benchmark:{i}", (Message("user", text),), {}) for i, text in enumerate(texts)]


class Both:
    """One server, asked through Verst and directly."""

    def __init__(self, config: Config, chosen: Sequence[Prompt], logs: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config, self.prompts = config, chosen
        self.worker = RolloutWorker(config, Extensions(), 0, device, logs)
        self.groups: list[Group] = []
        self._rolled = 0

    async def through_verst(self) -> int:
        """Rolls all groups; returns the tokens generated."""
        self._rolled += len(self.prompts)  # every group another number, so that ids and seeds differ
        rolling = (self.worker.roll(self._rolled + i, prompt, "policy") for i, prompt in enumerate(self.prompts))
        self.groups = [decode_group(encoded) for encoded in await asyncio.gather(*rolling)]
        return sum(t.generated_tokens for t in self._trajectories())

    async def one_batch(self) -> int:
        bodies = self._bodies()
        answers = await self._post({"input_ids": [body["input_ids"] for body in bodies], **self._common()})
        return sum(len(answer["output_ids"]) for answer in answers)

    async def one_request_each(self) -> int:
        answers = await asyncio.gather(*(self._post({**body, **self._common()}) for body in self._bodies()))
        return sum(len(answer["output_ids"]) for answer in answers)

    def _trajectories(self) -> list[Any]:
        return [t for group in self.groups for t in group.trajectories]

    def _bodies(self) -> list[dict[str, Any]]:
        return [{"input_ids": t.tokens_T[: t.turns[0].generated].tolist()} for t in self._trajectories()]

    def _common(self) -> dict[str, Any]:
        self._rolled += 1
        stop = self.worker._renderer.stop_token_ids
        parameters = {"max_new_tokens": self.config.rollout.max_new_tokens, "temperature": 1.0, "stop_token_ids": list(stop)}
        return {"sampling_params": parameters, "return_logprob": True, "extra_key": f"direct-{self._rolled}"}

    async def _post(self, body: dict[str, Any]) -> Any:
        return await self.worker.engine._api._call("POST", "/generate", body, DEADLINE_S)


async def timed(call: Callable[[], Awaitable[int]]) -> float:
    """Generated tokens a second."""
    start = time.perf_counter()
    tokens = await call()
    return tokens / (time.perf_counter() - start)


async def measure(both: Both, repeats: int) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {"verst": [], "one_batch": [], "one_request_each": []}
    await both.worker.start(scores=True)
    try:
        for repeat in range(1 + repeats):
            for name, call in (("verst", both.through_verst), ("one_batch", both.one_batch), ("one_request_each", both.one_request_each)):
                speed = await timed(call)
                if repeat:
                    speeds[name].append(speed)
            print(f"repeat {repeat}: " + ", ".join(f"{n} {s[-1]:,.0f} tokens/s" for n, s in speeds.items() if s), flush=True)
        failed = sum(t.error is not None for t in both._trajectories())
        if failed:
            raise SystemExit(f"{failed} trajectories failed, the first one: {next(t.error for t in both._trajectories() if t.error)}")
    finally:
        await both.worker.close()
    return speeds


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b" if on_gpu else "tiny")
    parser.add_argument("--groups", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--group-size", type=int, default=8 if on_gpu else 4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens, those of the chat template not counted")
    parser.add_argument("--new", type=int, default=512 if on_gpu else 64, help="tokens of each completion at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sglang", action="append", default=[], metavar="NAME=JSON", help="argument of SGLang's server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollout_overhead-") as scratch:
        directory = Path(scratch)
        write_model(SHAPES[options.shape], directory / "model", options.prompt + options.new + 64)
        both = Both(run_file(options, directory), prompts(options), directory)
        speeds = asyncio.run(measure(both, options.repeats))
    middle = {name: median(values) for name, values in speeds.items()}
    own = max(middle["one_batch"], middle["one_request_each"])
    settings = {name: getattr(options, name) for name in ("shape", "groups", "group_size", "prompt", "new", "repeats")}
    machine = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}
    result = {"benchmark": "rollout_overhead", "ratio": middle["verst"] / own, "tok_s": middle, "each": speeds}
    print(json.dumps(result | settings | machine))


if __name__ == "__main__":
    main()
