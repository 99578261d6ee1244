"""What the tests of the megatron backend share: one tiny model on disk for each family, and the backend built as a run builds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from tests.unit.fsdp_cases import VOCABULARY, write_model
from verst.config.schema import Config
from verst.routing.records import routes_of
from verst.runtime.batching import routes_for
from verst.training.megatron.backend import MegatronBackend
from verst.types import NO_VERSION, Batch, RoutedExperts, Sample

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,
}
_EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
FAMILIES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "llama_tied": (transformers.LlamaConfig, {"tie_word_embeddings": True, "vocab_size": VOCABULARY + 1}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, _EXPERTS | {"mlp_only_layers": [1]}),
    "deepseek_v3": (transformers.DeepseekV3Config, _LATENT),
    "deepseek_v3_dense": (transformers.DeepseekV3Config, _LATENT | {"first_k_dense_replace": 4}),
    "deepseek_v3_yarn": (transformers.DeepseekV3Config, _LATENT | {"rope_parameters": _YARN, "q_lora_rank": None}),
}
"""One fixture for each table, with the options that tables must follow."""


def save_model(path: Path, family: str = "qwen3", **options: Any) -> str:
    """Writes a random model of that family; see `write_model`."""
    kind, own = FAMILIES[family]
    return write_model(path, kind(**(_SIZES | own | options)))


def make_megatron(config: Config, rank: int = 0, world: int = 1, **arguments: Any) -> MegatronBackend:
    return MegatronBackend(config, rank=rank, world=world, device="cpu", arguments=arguments)


def with_routes(batch: Batch, kind: RoutedExperts) -> Batch:
    """The batch with random distinct experts for every token and layer, and sampled tokens of all ages from 0 to 5."""
    rng = np.random.default_rng(100 + batch.step)

    def routed(sample: Sample) -> Sample:
        count = len(sample.tokens_T)
        ids = rng.random((count - 1, kind.layers, kind.experts)).argsort(axis=-1)[..., : kind.chosen].astype(np.uint8)
        versions_T = np.where(sample.loss_mask_T, batch.step - 1 - rng.integers(0, 6, count), NO_VERSION).astype(np.int32)
        return replace(sample, routes=routes_of(sample.tokens_T, ids), versions_T=versions_T)

    return replace(batch, samples=tuple(routed(sample) for sample in batch.samples))


def delivered(batch: Batch, backend: MegatronBackend, config: Config) -> Batch:
    """What one rank is given of a batch: the routes of its own samples and layers."""
    wanted = backend.routes_wanted
    own = {} if wanted is None else routes_for(batch, wanted, config)
    return replace(batch, samples=tuple(replace(s, routes=own.get(i)) for i, s in enumerate(batch.samples)))
