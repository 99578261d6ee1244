"""Megatron's model of one rank: its chunks, and a forward pass that ends in log-probabilities instead of logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_model_config
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from verst.errors import ModelError
from verst.training.logprobs import VocabularyShard, token_logprobs
from verst.training.megatron import groups
from verst.training.megatron.packed import Packed
from verst.training.megatron.specs import block_spec, compile_layers, packed_sequences, rotate_once
from verst.training.megatron.table.rows import padded


def build_chunks(
    config: Any, hf_config: Any, virtual: int, device: torch.device, *, compiled: bool, values: bool = False
) -> list[GPTModel]:
    """The model chunks of this rank's pipeline stage, on the device, with weights not yet read. `values`: of a critic."""
    chunks = [_chunk(config, hf_config, stage if virtual > 1 else None, device, values) for stage in range(virtual)]
    for chunk in chunks if compiled else []:
        compile_layers(chunk)
    return chunks


def _chunk(config: Any, hf_config: Any, stage: int | None, device: torch.device, values: bool) -> GPTModel:
    ends = {"ignore_virtual": stage is None, "vp_stage": stage}
    model = GPTModel(
        config,
        block_spec(config, stage),  # pyright: ignore[reportArgumentType] (it takes a block's parts too)
        vocab_size=padded(hf_config.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=hf_config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_parameters["rope_theta"],
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        parallel_output=True,
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        vp_stage=stage,
    )
    if values and model.post_process:
        head: Any = nn.Linear(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        model.output_layer = head
    _set_rope(model, hf_config)
    rotate_once(model, config)
    return model.to(device)


def _set_rope(model: GPTModel, hf_config: Any) -> None:
    """Gives the rotary embedding transformers' own frequencies, whatever their scaling. Latent attention has its own embedding."""
    rotary = getattr(model, "rotary_pos_emb", None)
    kind = hf_config.rope_parameters.get("rope_type", "default")
    if rotary is None or kind == "default":
        return
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    if factor != 1.0 or kind in ("dynamic", "longrope"):
        raise ModelError(
            f"config.json has rope_type {kind!r}, whose embedding is scaled or follows the sequence length; "
            "train.backend megatron has default, linear and llama3; train.backend fsdp has all"
        )
    rotary.inv_freq = frequencies


def forward(model: Any, packed: Packed, temperature: float, vocabulary: int) -> torch.Tensor:
    """One chunk's forward: hidden states for the next stage; from the last chunk [2, N], log-probabilities and entropies (no gradient)."""
    ranks, rank = groups.context().size(), groups.context().rank()
    local = packed.local_places(rank, ranks)
    return _run(model, packed, local, _score, (packed, local, temperature, vocabulary))


def forward_values(model: Any, packed: Packed) -> torch.Tensor:
    """One chunk's forward of a critic: hidden states for the next stage; from the last chunk [N] values, float32."""
    local = packed.local_places(groups.context().rank(), groups.context().size())
    return _run(model, packed, local, _value, (packed, local))


def _run(model: Any, packed: Packed, local: torch.Tensor, processor: Any, context: Any) -> torch.Tensor:
    tokens = packed.tokens_BT[:, local]
    return model(
        tokens,
        torch.zeros_like(tokens),  # rotary positions follow from the sequences' lengths
        None,
        packed_seq_params=packed_sequences(packed.lengths, local, get_model_config(model)),
        output_processor=processor,
        output_processor_context=context,
    )


def _value(hidden_states: torch.Tensor, output_layer: Any, context: Any, config: Any, **_: Any) -> torch.Tensor:
    packed, local = context
    for hook in output_layer._forward_pre_hooks.values():  # as in `_score`
        hook(output_layer, ())
    if config.sequence_parallel:  # each rank computes all values alike, so each has the whole gradient: on the way back it takes its part
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    hidden_states, weight = hidden_states.flatten(0, 1), output_layer.weight.float()
    if groups.context().size() == 1:
        return nn.functional.linear(hidden_states.index_select(0, packed.positions_N).float(), weight)[:, 0]
    own, rows = _own_positions(packed, local)
    values = nn.functional.linear(hidden_states.index_select(0, rows).float(), weight)[:, 0]
    whole: Any = _FromAllRanks.apply(values, own, len(packed.targets_N), groups.context())
    return whole


def _score(
    hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None, context: Any, config: Any, **_: Any
) -> torch.Tensor:
    packed, local, temperature, vocabulary = context
    for hook in output_layer._forward_pre_hooks.values():  # which gathers parameters; the layer itself is never called
        hook(output_layer, ())
    weight = output_layer.weight if output_weight is None else output_weight
    # Each rank has the gradient through its rows of the vocabulary: both regions sum over ranks on the way back.
    if config.sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
    options: dict[str, Any] = {"temperature": temperature, "shard": _shard(weight)}
    weight, hidden_states = _own_vocabulary(weight, vocabulary), hidden_states.flatten(0, 1)
    if groups.context().size() == 1:
        return torch.stack(token_logprobs(hidden_states.index_select(0, packed.positions_N), weight, packed.targets_N, **options))
    own, rows = _own_positions(packed, local)
    scores = torch.stack(token_logprobs(hidden_states.index_select(0, rows), weight, packed.targets_N[own], **options))
    whole: Any = _FromAllRanks.apply(scores, own, len(packed.targets_N), groups.context())
    return whole


def _own_positions(packed: Packed, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which loss tokens this context-parallel rank scores, and the rows of their hidden states."""
    places = torch.full((packed.tokens_BT.shape[1],), -1, dtype=torch.int64, device=local.device)
    places[local] = torch.arange(len(local), device=local.device)
    rows = places[packed.positions_N]
    own = (rows >= 0).nonzero()[:, 0]
    return own, rows[own]


def _own_vocabulary(weight: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """This rank's rows, without those that only fill up the vocabulary. A slice's gradient would be one more copy."""
    rows = vocabulary - groups.tensor().rank() * len(weight)
    return weight if rows >= len(weight) else weight[:rows]


def _shard(weight: torch.Tensor) -> VocabularyShard | None:
    if groups.tensor().size() == 1:
        return None
    return VocabularyShard(groups.tensor(), groups.tensor().rank() * len(weight))


class _FromAllRanks(torch.autograd.Function):
    """The loss tokens' scores of all context-parallel ranks on each. All compute the same loss, so each takes its own gradient back."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, own: torch.Tensor, count: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.save_for_backward(own)
        whole = scores.new_zeros(*scores.shape[:-1], count)
        whole[..., own] = scores
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (own,) = ctx.saved_tensors
        return grad[..., own], None, None, None
