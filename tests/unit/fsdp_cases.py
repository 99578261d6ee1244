"""What the tests of trainer backends share: tiny models on disk, run files, batches, and steps over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from verst.config.schema import Config
from verst.observe.metrics import Tally
from verst.protocols import TrainBackend
from verst.routing.records import narrowed, routes_of
from verst.runtime import batching
from verst.training.fsdp import FsdpBackend
from verst.types import NO_VERSION, Batch, RoutedExperts, Sample

VOCABULARY = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: Mapping[str, tuple[Callable[..., transformers.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"attention_bias": True}),
    "llama_tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {**_EXPERTS, "head_dim": 8, "moe_intermediate_size": 16, "norm_topk_prob": True}),
    "gemma2": (
        transformers.Gemma2Config,
        {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8},
    ),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
}


def save_model(path: Path, family: str = "llama", **options: Any) -> str:
    """Writes a random model of that family; see `write_model`."""
    kind, own = FAMILIES[family]
    return write_model(path, kind(**(_SIZES | own | options)))


def write_model(path: Path, config: transformers.PretrainedConfig) -> str:
    """Writes a random model with wide-spread weights, so that its log-probabilities are far from uniform, and a tokenizer."""
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(path)
    Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0")).save(str(path / "tokenizer.json"))
    return str(path)


def make_config(path: str, **sections: Mapping[str, Any]) -> Config:
    """A run file for this model: three steps of four groups of two, a learning rate that moves every weight."""
    base: dict[str, dict[str, Any]] = {
        "run": {"steps": 3},
        "model": {"path": path},
        "data": {"max_prompt_tokens": 4},
        "rollout": {"group_size": 2, "temperature": 0.8, "max_new_tokens": 8},
        "train": {"groups_per_step": 4, "microbatch_tokens": 24, "lr": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5, "threads": 1},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | dict(section)
    if base.get("algorithm", {}).get("name") in ("sft", "dpo"):
        del base["rollout"]["group_size"], base["rollout"]["temperature"]  # which do not apply: nothing is sampled
    return Config.model_validate(base)


def make_batch(step: int, groups: int = 4, longest: int = 11) -> Batch:
    """Random samples of two to a group: lengths, prompts, rewards and behaviour log-probabilities all differ."""
    rng = np.random.default_rng(step)
    samples = []
    for index in range(2 * groups):
        length, prompt = int(rng.integers(6, longest + 1)), int(rng.integers(1, 4))
        mask_T = np.arange(length) >= prompt
        mask_T[prompt + 1] = False  # a token the environment wrote
        samples.append(
            Sample(
                id=f"{index // 2}/{index % 2}",
                group=index // 2,
                tokens_T=rng.integers(3, VOCABULARY, length, dtype=np.int32),
                loss_mask_T=mask_T,
                behaviour_logprobs_T=np.where(mask_T, rng.normal(-3.0, 0.7, length), 0.0).astype(np.float32),
                versions_T=np.where(mask_T, step - 1, NO_VERSION).astype(np.int32),
                reward=float(rng.normal()),
            )
        )
    return Batch(step, tuple(range(groups)), tuple(samples))


def branched(batch: Batch) -> Batch:
    """Its eight samples as two groups: a trajectory with a branch and one without; one with two branches and two without."""
    shape = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 1, 0), (1, 2, 0)]
    rewards = {(s.group, s.id): s.reward for s in batch.samples}
    samples = tuple(
        replace(sample, id=f"{group}/{member}", group=group, branch=branch, reward=rewards[group, f"{group}/{member % 2}"] + member // 2)
        for sample, (group, member, branch) in zip(batch.samples, shape, strict=True)
    )
    return Batch(batch.step, (0, 1), samples)


def with_routes(batch: Batch, kind: RoutedExperts) -> Batch:
    """The batch with random routes, which differ from those that any router would choose."""
    rng = np.random.default_rng(batch.step)
    samples = []
    for sample in batch.samples:
        order_TLE = np.argsort(rng.random((len(sample.tokens_T) - 1, kind.layers, kind.experts)), axis=-1)
        samples.append(replace(sample, routes=routes_of(sample.tokens_T, narrowed(order_TLE[..., : kind.chosen], kind))))
    return replace(batch, samples=tuple(samples))


BATCHES = [make_batch(step) for step in (1, 2, 3)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama model; a test module takes this fixture by importing it."""
    return save_model(tmp_path_factory.mktemp("llama"))


def make_backend(config: Config, rank: int = 0, world: int = 1, device: str = "cpu") -> FsdpBackend:
    return FsdpBackend(config, rank=rank, world=world, device=device)


def advantages_of(config: Config, batch: Batch, reference_kl: Mapping[int, float]) -> list[float]:
    return batching.advantages(batch, config, reference_kl)


def train(
    backend: TrainBackend,
    config: Config,
    batches: Iterable[Batch],
    advantages: list[float] | None = None,
    all_ranks: Callable[[Mapping[int, float]], Mapping[int, float]] = dict,
    all_values: Callable[[Mapping[int, Any]], Mapping[int, Any]] = dict,
) -> list[Tally]:
    """Runs whole steps as the loop does, and returns this rank's tallies.

    `all_ranks` adds the reference KL of the others to its own, `all_values` the values of their critic.
    """
    tallies = []
    for batch in batches:
        scores = backend.load_batch(batch)
        signal = batching.signal(batch, config, all_ranks(scores.reference_kl), all_values(scores.values))
        tally = Tally().merge(scores.tally)
        for update in range(backend.num_updates):
            tally.merge(backend.forward_backward(update, advantages or signal.advantages, signal.returns))
            tally.merge(backend.optimizer_step(update))
        tallies.append(tally)
    return tallies


def weights_of(backend: TrainBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in backend.weights()}


def largest_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
