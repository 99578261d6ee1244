"""The language of the tables: rows that tie one Megatron tensor to the Hugging Face tensors it is made of, and to its split.

A row states three independent things: names, `fuse` (how several tensors become one) and `split` (which axis tensor parallelism cuts).
Import and export are the two readings of the same row, so that export after import gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """`megatron` and `hf` are names with `{layer}` and `{expert}` counted over the whole model.

    `aliases` are the names of the same tensor where TransformerEngine's modules are used.
    """

    megatron: str
    hf: tuple[str, ...]
    split: Literal["no", "rows", "columns", "vocabulary"] = "no"
    fuse: Literal["no", "gate_up", "qkv"] = "no"
    aliases: tuple[str, ...] = ()
    layers: Literal["all", "dense", "moe"] = "all"

    @property
    def is_expert(self) -> bool:
        return "{expert}" in self.megatron

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron


@dataclass(frozen=True, slots=True)
class Family:
    """`arguments` turns a transformers config into Megatron's arguments; `problems` says why a config cannot be trained, if so.

    `is_moe` tells the kind of a layer; tensors whose names start with one of `ignored` (formatted with the config's values) are left out.
    """

    name: str
    rows: tuple[Row, ...]
    arguments: Callable[[Any], dict[str, Any]]
    problems: Callable[[Any], list[str]]
    is_moe: Callable[[Any, int], bool] = lambda config, layer: False
    experts: Callable[[Any], int] = lambda config: 0
    ignored: Callable[[Any], tuple[str, ...]] = lambda config: ()

    def rows_for(self, hf_config: Any) -> tuple[Row, ...]:
        """The rows of this model. A tied output layer has no tensor of its own in Hugging Face's files."""
        if not hf_config.tie_word_embeddings:
            return self.rows
        return tuple(row for row in self.rows if row.megatron != OUTPUT.megatron)


EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), split="vocabulary")
FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",))
OUTPUT = Row("output_layer.weight", ("lm_head.weight",), split="vocabulary")

_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}."


def layer_row(megatron: str, *hf: str, **options: Any) -> Row:
    """A row of one decoder layer; both sides' names are given from below the layer."""
    aliases = tuple(_LAYER + alias for alias in options.pop("aliases", ()))
    return Row(_LAYER + megatron, tuple(_HF + name for name in hf), aliases=aliases, **options)


PRE_MLP_NORM = (layer_row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", aliases=("mlp.linear_fc1.layer_norm_weight",)),)
GQA = (
    layer_row("input_layernorm.weight", "input_layernorm.weight", aliases=("self_attention.linear_qkv.layer_norm_weight",)),
    layer_row(
        "self_attention.linear_qkv.weight",
        *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        split="rows",
        fuse="qkv",
    ),
    layer_row("self_attention.linear_proj.weight", "self_attn.o_proj.weight", split="columns"),
)
QK_NORM = (
    layer_row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    layer_row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)


def gated_mlp(megatron: str, hf: str, layers: Literal["all", "dense", "moe"]) -> tuple[Row, ...]:
    """A gated MLP below the layer: `megatron` and `hf` are the names of the module on both sides, with a dot behind."""
    return (
        layer_row(
            megatron + "linear_fc1.weight", hf + "gate_proj.weight", hf + "up_proj.weight", split="rows", fuse="gate_up", layers=layers
        ),
        layer_row(megatron + "linear_fc2.weight", hf + "down_proj.weight", split="columns", layers=layers),
    )


EXPERTS = (
    Row(
        _EXPERT + "linear_fc1.weight",
        (_HF + "mlp.experts.{expert}.gate_proj.weight", _HF + "mlp.experts.{expert}.up_proj.weight"),
        split="rows",
        fuse="gate_up",
        aliases=(_LAYER + "mlp.experts.linear_fc1.weight{expert}",),
        layers="moe",
    ),
    Row(
        _EXPERT + "linear_fc2.weight",
        (_HF + "mlp.experts.{expert}.down_proj.weight",),
        split="columns",
        aliases=(_LAYER + "mlp.experts.linear_fc2.weight{expert}",),
        layers="moe",
    ),
)
ROUTER = (layer_row("mlp.router.weight", "mlp.gate.weight", layers="moe"),)


def shard(row: Row, parts: Sequence[torch.Tensor], rank: int, ranks: int, groups: int) -> torch.Tensor:
    """The part of one Megatron tensor that tensor-parallel rank `rank` holds, from full Hugging Face tensors.

    `groups` is the number of key-value heads, whose queries, keys and values lie together in Megatron's fused tensor.
    """
    if row.split == "no":
        (whole,) = parts
        return whole
    if row.split == "columns":
        (whole,) = parts
        return whole.tensor_split(ranks, dim=1)[rank]
    if row.split == "vocabulary":
        (whole,) = parts
        rows = padded(whole.shape[0], ranks) // ranks
        own = whole[rank * rows : (rank + 1) * rows]
        return torch.cat([own, own.new_zeros(rows - len(own), *own.shape[1:])]) if len(own) < rows else own
    own = [part.tensor_split(ranks, dim=0)[rank] for part in parts]
    return _interleave(own, groups // ranks if row.fuse == "qkv" else 1)


def unshard(row: Row, shards: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], groups: int) -> list[torch.Tensor]:
    """The inverse of `shard`: full Hugging Face tensors of these shapes from the shards of all ranks, in order.

    Of one shard they are views, but for queries, keys and values.
    """
    if row.split == "no":
        return [shards[0]]
    if row.split == "columns":
        return [_joined(shards, dim=1)]
    if row.split == "vocabulary":
        return [_joined(shards, dim=0)[: shapes[0][0]]]
    ranks = len(shards)
    sizes = [shape[0] // ranks for shape in shapes]
    pieces = [_deinterleave(part, sizes, groups // ranks if row.fuse == "qkv" else 1) for part in shards]
    return [_joined([piece[i] for piece in pieces], dim=0) for i in range(len(shapes))]


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def padded(rows: int, ranks: int) -> int:
    """Rows of the vocabulary matrices in Megatron: the next multiple of the tensor-parallel size. The added rows are never looked at."""
    return -(-rows // ranks) * ranks


def _interleave(parts: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Rows of all parts, group after group."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _deinterleave(fused: torch.Tensor, sizes: Sequence[int], groups: int) -> list[torch.Tensor]:
    if len(sizes) == 1:
        return [fused]
    return [part.flatten(0, 1) for part in fused.unflatten(0, (groups, -1)).split([size // groups for size in sizes], dim=1)]


def common_arguments(config: Any) -> dict[str, Any]:
    """What every decoder of this kind shares, as Megatron's arguments."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": config.rope_parameters["rope_theta"],
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
    }


def gqa_arguments(config: Any) -> dict[str, Any]:
    """Grouped-query attention."""
    return {
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def unsupported(config: Any, needed: Mapping[str, Any]) -> list[str]:
    """One line for each option of the config that is not as needed."""
    return [
        f"config.json has {name} {getattr(config, name)!r}; train.backend megatron trains this family with {value!r} only"
        for name, value in needed.items()
        if getattr(config, name, value) not in (value, None)
    ]
