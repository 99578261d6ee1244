"""Log-probabilities of engines and trainers against transformers, and gradients of every parallel layout against one rank.

    python benchmarks/parity.py [--dtype bfloat16] [--families qwen3 …] [--sides hf sglang fsdp megatron] [--sglang KEY=VALUE …]

For each family it writes a tiny model with random weights, then asks each side for the log-probabilities of the same tokens: engines score
given sequences (prefill) and tell those of tokens they sample themselves (decoding); trainers score them on one rank and on two, and tell
the norm of a batch's gradient. transformers computes everything again in its plain way, in the same type. Every side has processes of its
own. On a machine with CUDA all of it runs there, in bfloat16 unless --dtype says otherwise; layouts of two ranks need two GPUs.

The tables are in Markdown, "mean / largest" |difference|; the last line is one JSON object. What a side refuses is in the table, with the
reason below it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verst.config.schema import Config
from verst.errors import VerstError

VOCABULARY = 256
SEQUENCES, LENGTH, NEW_TOKENS = 6, 48, 40
SIDE_S = 1500.0
SIDES = ("hf", "sglang", "fsdp", "megatron")
TP, PP, CP, EP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context", "expert_model"))
LAYOUTS: Mapping[str, Mapping[str, Any]] = {"TP2": {TP: 2}, "PP2": {PP: 2}, "CP2": {CP: 2}, "EP2": {EP: 2}, "DP2": {}}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
"""Rotary scaling as the released DeepSeek-V3 has it, for a shorter context."""
EXPERTS = ("qwen3_moe", "deepseek_v3")


@dataclass
class Found:
    """What one side found out about one family in one case."""

    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)  # entry of the first log-probability that counts
    logprobs: list[NDArray[np.float32]] = field(default_factory=list)  # as long as the tokens
    gradient_norm: float | None = None
    refused: str = ""

    def add(self, tokens: NDArray[np.int32], first: int, logprobs: NDArray[np.float32]) -> None:
        self.tokens.append(tokens)
        self.first.append(first)
        self.logprobs.append(logprobs)


Results = dict[tuple[str, str], Found]
"""By family and case, such as ("qwen3", "megatron, TP2")."""


# ---- models and data


def write_model(path: Path, family: str, *, cuda: bool) -> None:
    """Random weights, wide enough that log-probabilities are far from uniform. With CUDA the heads have sizes that its kernels take."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    head = 64 if cuda else 16
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 4 * head,
        "intermediate_size": 8 * head,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        **{"bos_token_id": None, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0},
    }
    experts: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 4 * head, "norm_topk_prob": True}
    latent: dict[str, Any] = {
        "kv_lora_rank": 8 * head,
        "q_lora_rank": 4 * head,
        "qk_rope_head_dim": head,
        "qk_nope_head_dim": 2 * head,
        "v_head_dim": 2 * head,
    }
    grouped: dict[str, Any] = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }
    families: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (transformers.LlamaConfig, {}),
        "qwen3": (transformers.Qwen3Config, {"head_dim": head}),
        "qwen3_moe": (transformers.Qwen3MoeConfig, experts | {"head_dim": head, "num_experts": 4}),
        "deepseek_v3": (
            transformers.DeepseekV3Config,
            experts | latent | grouped | {"num_key_value_heads": 4, "rope_parameters": YARN},
        ),
    }
    kind, own = families[family]
    config = kind(**(sizes | own))
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{VOCABULARY - 1}", pad_token="w0").save_pretrained(path)


FAMILIES = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")


def sequences(count: int = SEQUENCES, length: int = LENGTH) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, VOCABULARY - 1, length - 3 * i, dtype=np.int32) for i in range(count)]


def config_of(model: Path, dtype: str, **train: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 10},
            "model": {"path": str(model), "dtype": dtype},
            "data": {"max_prompt_tokens": LENGTH},
            "rollout": {"group_size": 2, "max_new_tokens": NEW_TOKENS},
            "train": {
                "groups_per_step": SEQUENCES // 2,
                "microbatch_tokens": 2 * (LENGTH + NEW_TOKENS),
                "lr": 1e-4,
                "routes": "ignore",  # every side routes by itself, or nothing would be compared
                **train,
            },
        }
    )


# ---- sides, each in processes of its own


@dataclass(frozen=True)
class Orders:
    """What one process has to do; it is told as JSON."""

    side: str
    families: Sequence[str]
    dtype: str
    device: str
    directory: str
    sglang: Mapping[str, Any]
    rank: int = 0
    world: int = 1
    address: str = ""

    def model(self, family: str) -> Path:
        return Path(self.directory) / family

    @property
    def output(self) -> Path:
        return Path(self.directory) / f"{self.side}-{self.rank}-of-{self.world}.pickle"


async def engine_side(orders: Orders) -> Results:
    results: Results = {}
    for family in orders.families:
        scored, sampled = results[family, f"{orders.side}, scoring"], results[family, f"{orders.side}, decoding"] = Found(), Found()
        try:
            await ask_engine(make_engine(orders, family), scored, sampled)
        except VerstError as error:
            scored.refused = sampled.refused = str(error).splitlines()[0]
    return results


def make_engine(orders: Orders, family: str) -> Any:
    path, options = str(orders.model(family)), {"dtype": orders.dtype, "device": orders.device, "max_model_tokens": LENGTH + NEW_TOKENS}
    if orders.side == "hf":
        from verst.rollout.hf import HFEngine

        return HFEngine(path, max_running=SEQUENCES, deterministic=False, **options)
    from verst.rollout.sglang import SGLangEngine

    log = Path(orders.directory) / f"sglang-{family}.log"
    arguments = {"max_total_tokens": 16384, **orders.sglang}
    return SGLangEngine(path, max_running=SEQUENCES, arguments=arguments, log=log, start_deadline_s=600.0, **options)


async def ask_engine(engine: Any, scored: Found, sampled: Found) -> None:
    from verst.types import GenerateRequest, Sampling

    try:
        await engine.start()
        for tokens in sequences():
            scored.add(tokens, 1, await engine.logprobs(tokens))
        requests = [GenerateRequest(str(i), t[:8], Sampling(max_new_tokens=NEW_TOKENS), i) for i, t in enumerate(sequences())]
        for request, answer in zip(requests, await asyncio.gather(*map(engine.generate, requests)), strict=True):
            before = np.zeros(len(request.tokens_T), np.float32)
            whole = np.concatenate((request.tokens_T, answer.tokens_T))
            sampled.add(whole, len(before), np.concatenate((before, answer.logprobs_T)))
    finally:
        await engine.close()


def trainer_side(orders: Orders) -> Results:
    from verst.training.distributed import init_distributed, leave_distributed

    if orders.world > 1:
        init_distributed(orders.rank, orders.world, orders.address, timeout_s=300, device=orders.device)
    results: Results = {}
    for family in orders.families:
        for case, options in trainer_cases(orders, family):
            found = results[family, case] = Found()
            try:
                ask_trainer(
                    orders, config_of(orders.model(family), orders.dtype, backend=orders.side, ranks=orders.world, **options), found
                )
            except VerstError as error:
                found.refused = str(error).splitlines()[0]
    leave_distributed()
    return results


def trainer_cases(orders: Orders, family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if orders.world == 1:
        yield f"{orders.side}, one rank", {}
    elif orders.side == "fsdp":
        yield "fsdp, two ranks", {}
    else:
        for layout, arguments in LAYOUTS.items():
            if layout == "EP2" and family not in EXPERTS:
                continue
            together = {"sequence_parallel": True} if layout == "TP2" and family in EXPERTS else {}
            yield f"megatron, {layout}", {"megatron": {**arguments, **together}}


def ask_trainer(orders: Orders, config: Config, found: Found) -> None:
    from verst.observe.metrics import Tally
    from verst.training.backends import make_backend
    from verst.types import Batch, Sample

    backend = make_backend(config, rank=orders.rank, world=orders.world, device=orders.device)
    for tokens in sequences():
        found.add(tokens, 1, backend.logprobs(tokens))
    samples = []
    for i, tokens in enumerate(sequences()):
        mask, rng = np.arange(len(tokens)) >= 4, np.random.default_rng(i)
        behaviour = np.where(mask, rng.normal(-5, 1, len(tokens)), 0).astype(np.float32)
        samples.append(Sample(f"{i // 2}/{i % 2}", i // 2, tokens, mask, behaviour, np.where(mask, 0, -1).astype(np.int32), float(i % 2)))
    batch = Batch(1, tuple(range(SEQUENCES // 2)), tuple(samples))
    backend.load_batch(batch)
    backend.forward_backward(0, [1.0 - 2.0 * (i % 2) for i in range(SEQUENCES)])
    tally = Tally().merge(backend.optimizer_step(0))
    found.gradient_norm = tally.report().get("update/grad_norm")


def reference(directory: Path, family: str, dtype: str, device: str, wanted: Sequence[Found]) -> list[list[NDArray[np.float32]]]:
    """transformers' own full forward pass over the tokens of each."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / family, dtype=getattr(torch, dtype), experts_implementation="eager")
    model = model.eval().to(device)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def score(tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(device)
        logs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return np.concatenate(([0.0], logs.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy())).astype(np.float32)

    return [[score(tokens) for tokens in found.tokens] for found in wanted]


# ---- starting them


def run_side(orders: Orders) -> None:
    """The process of one side and rank."""
    results = asyncio.run(engine_side(orders)) if orders.side in ("hf", "sglang") else trainer_side(orders)
    if orders.rank == 0:
        orders.output.write_bytes(pickle.dumps(results))


def start(all_orders: Sequence[Orders]) -> Results:
    """Runs the ranks of one side to their end. Exits with what a rank said if one of them fails."""
    running = []
    for orders in all_orders:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if orders.world > 1 and orders.device == "cuda":
            env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[orders.rank]
        log = orders.output.with_suffix(".log")
        with log.open("w") as output:
            command = [sys.executable, "-W", "ignore", __file__, "--orders", json.dumps(vars(orders))]
            running.append((log, subprocess.Popen(command, stdout=output, stderr=output, env=env)))
    limit = time.monotonic() + SIDE_S
    try:
        for log, process in running:
            if process.wait(max(1.0, limit - time.monotonic())):
                raise SystemExit(f"{log.stem} failed:\n{log.read_text()[-3000:]}")
    finally:
        for _, process in running:
            process.kill()
            process.wait()
    return pickle.loads(all_orders[0].output.read_bytes())


def every_side(options: argparse.Namespace, directory: Path, device: str, gpus: int) -> Results:
    from verst.training.distributed import Rendezvous

    sglang = {
        key: json.loads(value) if value[:1] in "0123456789tf[{" else value for key, _, value in (o.partition("=") for o in options.sglang)
    }
    shared = (options.families, options.dtype, device, str(directory), sglang)
    results: Results = {}
    for side in options.sides:
        print(f"{side} …", file=sys.stderr, flush=True)
        results |= start([Orders(side, *shared)])
        if side in ("fsdp", "megatron") and (device == "cpu" or gpus > 1):
            meeting = Rendezvous()
            results |= start([Orders(side, *shared, rank, 2, meeting.address) for rank in range(2)])
    return results


# ---- the report


def differences(results: Results, directory: Path, dtype: str, device: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and largest |difference| by family and case."""
    measured = {}
    for family in dict.fromkeys(family for family, _ in results):
        asked = {case: found for (of, case), found in results.items() if of == family and found.tokens and not found.refused}
        for (case, found), expected in zip(asked.items(), reference(directory, family, dtype, device, list(asked.values())), strict=True):
            apart = [np.abs(got - want)[first:] for got, want, first in zip(found.logprobs, expected, found.first, strict=True)]
            measured[family, case] = (float(np.concatenate(apart).mean()), float(np.concatenate(apart).max()))
    return measured


def norms(results: Results) -> dict[tuple[str, str], float]:
    """Relative difference of the gradient's norm from that of fsdp on one rank, by family and case."""
    alone = {family: found.gradient_norm for (family, case), found in results.items() if case == "fsdp, one rank"}
    return {
        (family, case): abs(found.gradient_norm / base - 1)
        for (family, case), found in results.items()
        if found.gradient_norm is not None and (base := alone.get(family)) and case != "fsdp, one rank"
    }


def table(title: str, families: Sequence[str], cells: Mapping[tuple[str, str], str]) -> list[str]:
    cases = dict.fromkeys(case for _, case in cells)
    rows = [f"| {case} | " + " | ".join(cells.get((family, case), "") for family in families) + " |" for case in cases]
    return [f"| {title} | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|", *rows]


def report(results: Results, measured: Mapping[tuple[str, str], tuple[float, float]], families: Sequence[str]) -> list[str]:
    reasons = list(dict.fromkeys(found.refused for found in results.values() if found.refused))
    cells = {key: f"refused ({reasons.index(found.refused) + 1})" for key, found in results.items() if found.refused}
    cells |= {key: f"{mean:.1e} / {largest:.1e}" for key, (mean, largest) in measured.items()}
    gradients = {key: f"{apart:.1e}" for key, apart in norms(results).items()}
    ordered = {key: cells[key] for key in results if key in cells}
    notes = [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]
    return [*table("log-probabilities", families, ordered), "", *table("gradient norm, relative", families, gradients), *notes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--sglang", nargs="*", default=[], metavar="KEY=VALUE", help="arguments of SGLang's server")
    parser.add_argument("--orders", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.orders:
        return run_side(Orders(**json.loads(options.orders)))
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    gpus = torch.cuda.device_count()
    device = "cuda" if gpus else "cpu"
    options.dtype = options.dtype or ("bfloat16" if gpus else "float32")
    with tempfile.TemporaryDirectory(prefix="parity-") as place:
        for family in options.families:
            write_model(Path(place) / family, family, cuda=bool(gpus))
        results = every_side(options, Path(place), device, gpus)
        measured = differences(results, Path(place), options.dtype, device)
    for line in report(results, measured, options.families):
        print(line)
    about = {"device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": gpus, "dtype": options.dtype, "torch": torch.__version__}
    found = {f"{family}, {case}": {"mean": mean, "max": largest} for (family, case), (mean, largest) in measured.items()}
    gradients = {f"{family}, {case}": apart for (family, case), apart in norms(results).items()}
    refused = {f"{family}, {case}": found.refused for (family, case), found in results.items() if found.refused}
    print(json.dumps({"benchmark": "parity", **about, "logprobs": found, "gradient_norm": gradients, "refused": refused}))


if __name__ == "__main__":
    main()
