"""The modules a layer is made of: TransformerEngine's where it is installed, else Megatron's own with three of ours.

Megatron's own ("local") modules lack a norm that may run under sequence parallelism and an attention that takes packed sequences or
context parallelism; and their latent attention loses a part of a gradient under tensor parallelism. Those three are here, on PyTorch alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from verst.training.megatron import groups


class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed batch, with the lengths also as numbers: reading them from a GPU tensor would wait for it."""

    lengths: tuple[int, ...]


def packed_sequences(lengths: tuple[int, ...], device: torch.device) -> PackedSequences:
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    packed = PackedSequences(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest, pad_between_seqs=False
    )
    packed.lengths = lengths
    return packed


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` whose gradient is summed over tensor-parallel ranks where each sees a part of the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class Attention(MegatronModule):
    """Causal attention within each packed sequence, by PyTorch's scaled dot product.

    With context parallelism keys and values of all ranks are gathered; their gradients are summed on the way back.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Queries [T, heads, size], keys and values [T, groups, size] to [T, heads · size]; T are this rank's tokens."""
        assert packed_seq_params is not None
        ranks = groups.context().size()
        lengths = packed_seq_params.lengths
        if ranks == 1:
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            return torch.cat([self._attend(q, k, v, None) for q, k, v in parts]).flatten(1)
        return self._over_ranks(query, key, value, lengths, ranks)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return out[0].transpose(0, 1)

    def _over_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], ranks: int
    ) -> torch.Tensor:
        group, rank = groups.context(), groups.context().rank()
        own = [length // ranks for length in lengths]
        gathered = []
        for tensor in (key, value):
            whole = tensor_parallel.gather_from_sequence_parallel_region(tensor.contiguous(), group=group)
            # [ranks, T / ranks, ...] → sequence by sequence, each with the pieces of all ranks
            gathered.append([torch.cat(pieces) for pieces in zip(*(part.split(own) for part in whole.chunk(ranks)), strict=True)])
        outputs = []
        for q, k, v, length in zip(query.split(own), *gathered, lengths, strict=True):
            at_q = _places(length, rank, ranks, q.device)
            at_k = torch.cat([_places(length, r, ranks, q.device) for r in range(ranks)])
            outputs.append(self._attend(q, k, v, at_q[:, None] >= at_k[None]))
        return torch.cat(outputs).flatten(1)


def _places(length: int, rank: int, ranks: int, device: torch.device) -> torch.Tensor:
    """Places in one sequence of the tokens that a rank holds: see `verst.training.megatron.packed`."""
    piece = length // (2 * ranks)
    first, second = (torch.arange(p * piece, (p + 1) * piece, device=device) for p in (rank, 2 * ranks - 1 - rank))
    return torch.cat((first, second))


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention whose gradients are whole under tensor parallelism.

    Each rank uses the whole rotary key for its own heads, so each has a part of its gradient. Megatron gathers the key from the ranks'
    columns and, on the way back, gives each rank its columns of its own part only.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None and not config.sequence_parallel:
            # Here each rank has the norm's whole gradient, and Megatron sums over ranks all that is called q_layernorm. A mean undoes it.
            norm: Any = self.q_layernorm
            norm.weight.average_gradients_across_tp_domain = True

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": RMSNorm,
            "kv_layernorm": RMSNorm,
        }

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        compressed_q, columns = super()._qkv_down_projection(hidden_states)
        if self.tp_group.size() == 1:
            return compressed_q, columns
        combined = tensor_parallel.gather_from_tensor_model_parallel_region(columns)
        if self.config.sequence_parallel:  # the base class gathers the rotary part along the sequence, and sums on the way back
            return compressed_q, tensor_parallel.scatter_to_sequence_parallel_region(combined)
        latent, rotary = combined.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return compressed_q, torch.cat((latent, tensor_parallel.copy_to_tensor_model_parallel_region(rotary)), dim=-1)


def block_spec(config: Any, stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage, or of one of its virtual stages."""
    engine = config.transformer_impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=engine, normalization="RMSNorm", vp_stage=stage)
    if not engine:
        spec.layer_norm = RMSNorm
        for layer in spec.layer_specs or ():
            _use_ours(layer)
    return spec


def _use_ours(layer: Any) -> None:
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention: ModuleSpec = parts.self_attention
    inner: Any = attention.submodules
    inner.core_attention = Attention
    if attention.module is MLASelfAttention:
        attention.module = LatentAttention
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(inner, name, None) is WrappedTorchNorm:
            setattr(inner, name, RMSNorm)
