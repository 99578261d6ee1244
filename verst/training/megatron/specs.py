"""The modules a layer is made of: TransformerEngine's where it is installed, else Megatron's own with three of ours.

Megatron's own ("local") modules lack a norm that may run under sequence parallelism and an attention that takes packed sequences or
context parallelism; and their latent attention loses a part of a gradient under tensor parallelism. Those three are here, on PyTorch alone.
So are the rotary angles: Megatron's own way with packed sequences waits for the GPU in every layer and rotates them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
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
from verst.training.model import compiled

DENSE = True
"""Sequences of one length, as completions cut at their limit are, go through the kernel that PyTorch thinks best. On an H100 that is
cuDNN's, unless in deterministic mode. It builds a plan for every new shape, so it is not for lengths that differ each time."""


class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed batch, with the lengths also as numbers: reading them from a GPU tensor would wait for it."""

    lengths: tuple[int, ...]
    places: torch.Tensor
    """[T] int64, the place in its sequence of each token that this rank holds."""
    are_even: bool
    """Several sequences, all of one length: rows of a matrix."""


def packed_sequences(lengths: tuple[int, ...], local: torch.Tensor, config: Any) -> PackedSequences:
    """`local` [T] int64 are the places along all sequences of the tokens that this rank holds."""
    starts = np.cumsum([0, *lengths])
    ends = torch.from_numpy(starts.astype(np.int32)).to(local.device)
    longest = max(lengths)
    packed = PackedSequences(
        qkv_format="sbhd" if _rotates_once(config) else "thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,
    )
    packed.lengths = lengths
    packed.are_even = len(lengths) > 1 and set(lengths) == {longest}
    packed.places = local - torch.from_numpy(np.repeat(starts[:-1], lengths)).to(local.device)[local]
    return packed


def _rotates_once(config: Any) -> bool:
    """Whether `PackedRotary` takes the place of Megatron's rotary embedding. The rest of a layer then sees one long row of tokens."""
    return config.transformer_impl != "transformer_engine" and not config.multi_latent_attention


class PackedRotary(torch.nn.Module):
    """Rotary angles of every token of a packed batch, made once for all layers."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self._rotary = rotary

    def get_rotary_seq_len(
        self, inference_context: None, transformer: Any, transformer_input: Any, config: Any, packed: PackedSequences
    ) -> PackedSequences:
        """What Megatron's model hands on to `forward`."""
        return packed

    def forward(self, packed: PackedSequences, **_: Any) -> torch.Tensor:
        """[T, 1, 1, rotated size] float32."""
        return self._rotary.get_emb(packed.max_seqlen_q)[packed.places]


def rotate_once(model: Any, config: Any) -> None:
    if _rotates_once(config):
        model.rotary_pos_emb = PackedRotary(model.rotary_pos_emb)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` whose gradient is summed over tensor-parallel ranks where each sees a part of the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron's, with its group named: without it every call prepares a warning, which would also cut a compiled layer in two."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._forward_impl(input, weight, *args, **kwargs | {"tp_group": self.tp_group})


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
        """Queries [T, heads, size], keys and values [T, groups, size] to [T, heads · size]; T are this rank's tokens.

        Where Megatron sees one long row of tokens, all of them have a dimension of size 1 behind T.
        """
        assert packed_seq_params is not None
        if query.ndim == 4:
            query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
            return self._packed(query, key, value, packed_seq_params)[:, None]
        return self._packed(query, key, value, packed_seq_params)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        ranks = groups.context().size()
        if ranks > 1:
            return self._over_ranks(query, key, value, packed.lengths, ranks)
        if packed.are_even and DENSE:
            q, k, v = (tensor.unflatten(0, (-1, packed.max_seqlen_q)).transpose(1, 2) for tensor in (query, key, value))
            return self._attend(q, k, v, None).transpose(1, 2).flatten(0, 1).flatten(1)
        if _flash_takes(query, value):
            return flash_packed(query, key, value, packed.cu_seqlens_q, packed.max_seqlen_q, self.scale).flatten(1)
        parts = zip(query.split(packed.lengths), key.split(packed.lengths), value.split(packed.lengths), strict=True)
        return torch.cat([self._attend_one(q, k, v, None) for q, k, v in parts]).flatten(1)

    def _attend_one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return self._attend(q, k, v, mask)[0].transpose(0, 1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Over [rows, heads, length, size]."""
        grouped = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )

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
            outputs.append(self._attend_one(q, k, v, at_q[:, None] >= at_k[None]))
        return torch.cat(outputs).flatten(1)


def flash_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Causal attention within each sequence, all at once: [T, heads, size]. `ends` [sequences + 1] int32 begins with 0.

    It is the operator under `scaled_dot_product_attention`, which takes packed sequences though that function does not. Nothing is cut
    or joined, and sequences of any length share one compiled graph.
    """
    return torch.ops.aten._flash_attention_forward(query, key, value, ends, ends, longest, longest, 0.0, True, False, scale=scale)[0]


def _flash_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the GPU's kernel knows this type and size of heads."""
    size = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and size == value.shape[-1] and size % 8 == 0 and size <= 256


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


def compile_layers(model: Any) -> None:
    """`torch.compile` of each layer as a whole. All layers share their graphs.

    Without CUDA the graphs run as they were traced: Inductor asks the stand-ins of `compat` for more of a GPU than they know.
    """
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    for place, layer in enumerate(model.decoder.layers):
        forward = compiled(layer.forward, backend)
        layer.forward = forward if place else _of_a_copy(forward)


def _of_a_copy(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The embedding's output is a view of other strides than a layer's, for which the first layer would need graphs of its own."""

    def call(hidden_states: torch.Tensor, **others: Any) -> Any:
        return forward(hidden_states=hidden_states.clone(memory_format=torch.contiguous_format), **others)

    return call


def _use_ours(layer: Any) -> None:
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention: ModuleSpec = parts.self_attention
    inner: Any = attention.submodules
    inner.core_attention = Attention
    inner.linear_proj = RowParallelLinear
    dense = parts.mlp.keywords["submodules"]
    if hasattr(dense, "linear_fc2"):
        dense.linear_fc2 = RowParallelLinear
    if attention.module is MLASelfAttention:
        attention.module = LatentAttention
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(inner, name, None) is WrappedTorchNorm:
            setattr(inner, name, RMSNorm)
