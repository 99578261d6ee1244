"""What recording and replaying expert routes (R3, arXiv 2510.11370) costs: whole runs with and without, in turn.

    python benchmarks/r3_overhead.py [--size cpu|qwen3] [--engine hf] [--backend fsdp] [--steps 12] [--rounds 2] [--set KEY=VALUE ...]
        [--address HOST:PORT]

A random Mixture-of-Experts model of Qwen3's kind is trained by ordinary runs, synchronous, every completion of the same length. `replay`
records routes in the engine, carries them, and trains on them; `ignore` does none of it. The runs alternate (replay, ignore, ignore,
replay), and the first steps of each are left out. `qwen3` has the width, experts and routing of Qwen3-30B-A3B and 3 of its 48 layers.
On a Ray cluster of `--address` that counts two GPUs where there is one, trainer and engine share it without hand-overs.

- `overhead_share`: median step time of `replay` over that of `ignore`, minus 1; `rollout_share`, `train_share`: the same of these phases
- `route_agreement`: share of (token, layer) whose experts, as the dispatcher got them, are the recorded ones
- `bytes_per_token`: of routes, and `limit_bytes`: layers x chosen experts

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import verst
from verst.recipes.tiny import build_tiny_model

WARM = 3
TRAINING = ("load", "forward_backward", "optimizer")
SIZES: dict[str, dict[str, int]] = {
    "cpu": {"hidden": 64, "layers": 4, "experts": 16, "chosen": 4, "width": 32, "heads": 4, "kv": 4, "groups": 4, "members": 4, "new": 48},
    "qwen3": {
        "hidden": 2048,
        "layers": 3,
        "experts": 128,
        "chosen": 8,
        "width": 768,
        "heads": 32,
        "kv": 4,
        "groups": 16,
        "members": 8,
        "new": 512,
    },
}


def varied(trajectory: Any, fields: Any) -> float:
    """Differs between the members of a group, so that every step has a gradient."""
    return float(int(trajectory.tokens_T.sum()) % 7)


def build_model(directory: Path, size: dict[str, int]) -> Path:
    """A random model with a vocabulary so large that it never meets its end-of-turn token, beside the tokenizer of the quickstart."""
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    build_tiny_model(directory, hidden=64)
    ends = AutoConfig.from_pretrained(directory)
    options: dict[str, Any] = {
        "vocab_size": 32768,
        "hidden_size": size["hidden"],
        "intermediate_size": 2 * size["hidden"],
        "moe_intermediate_size": size["width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "head_dim": 128 if size["hidden"] > 1000 else 16,
        "num_experts": size["experts"],
        "num_experts_per_tok": size["chosen"],
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,  # SGLang's Qwen3-MoE has a head of its own, whatever the config says
        "bos_token_id": None,
        "eos_token_id": ends.eos_token_id,
        "pad_token_id": ends.pad_token_id,
    }
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options))
        model = model.to(torch.bfloat16 if on_gpu else torch.float32)
    model.save_pretrained(directory)
    return directory


def train(routes: str, model: Path, options: argparse.Namespace, scratch: Path, number: int) -> list[dict[str, Any]]:
    """The rows of one run's measured steps."""
    size, on_gpu = SIZES[options.size], torch.cuda.is_available()
    config = {
        "run": {"dir": str(scratch / "runs"), "name": f"{routes}-{number}", "steps": options.steps, "deterministic": False},
        "model": {"path": str(model), "dtype": "bfloat16" if on_gpu else "float32"},
        "data": {"max_prompt_tokens": 256},
        "rollout": {
            "engine": options.engine,
            "group_size": size["members"],
            "max_new_tokens": size["new"],
            "max_running": size["groups"] * size["members"],
        },
        "train": {"backend": options.backend, "groups_per_step": size["groups"], "lr": 1e-6, "routes": routes},
        "fidelity": {"limit": 100.0},
        "checkpoint": {"every_steps": options.steps + 1, "export_final": False, "snapshots": False},
    }
    prompts = [{"prompt": f"Alice has {i % 9 + 1} brothers and she also has {i // 9 + 1} sisters."} for i in range(81)]
    run = verst.train(
        config, overrides=options.set, reward=varied, prompts=prompts, address=options.address, echo=lambda line: print(line, flush=True)
    )
    shutil.rmtree(run.path)  # its checkpoint may be large
    return [row for row in run.rows if row["kind"] == "step"][WARM:]


def seconds(rows: list[dict[str, Any]], *phases: str) -> float:
    return median(sum(row[f"time/{phase}_s"] for phase in phases) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--engine", default="hf")
    parser.add_argument("--backend", default="fsdp")
    parser.add_argument("--steps", type=int, default=12, help=f"of each run; the first {WARM} are left out")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the run file; may be repeated")
    parser.add_argument("--address", help="of a Ray cluster to run on")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {"replay": [], "ignore": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = build_model(scratch / "model", SIZES[options.size])
        for number in range(options.rounds):
            for routes in list(rows)[:: 1 if number % 2 == 0 else -1]:
                begun = time.perf_counter()
                found = train(routes, model, options, scratch, number)
                rows[routes] += found
                print(f"{routes}: {seconds(found, 'step'):.3f} s a step, {time.perf_counter() - begun:.0f} s the run", flush=True)
    share = {
        name: seconds(rows["replay"], *phases) / seconds(rows["ignore"], *phases) - 1
        for name, phases in (("overhead_share", ("step",)), ("rollout_share", ("rollout",)), ("train_share", TRAINING))
    }
    size = SIZES[options.size]
    report = {
        "benchmark": "r3_overhead",
        **share,
        "step_s": {routes: seconds(found, "step") for routes, found in rows.items()},
        "rollout_s": {routes: seconds(found, "rollout") for routes, found in rows.items()},
        "route_agreement": mean(row["routes/replayed"] for row in rows["replay"]),
        "bytes_per_token": mean(row["routes/bytes_per_token"] for row in rows["replay"]),
        "limit_bytes": size["layers"] * size["chosen"],
        "tokens_per_step": mean(row["rollout/generated_tokens"] for row in rows["replay"]) * size["groups"] * size["members"],
        "mismatch_k3": {routes: mean(row["mismatch/k3"] for row in found) for routes, found in rows.items()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        **{name: getattr(options, name) for name in ("size", "engine", "backend", "steps", "rounds")},
        **size,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
