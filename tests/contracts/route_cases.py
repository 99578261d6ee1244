"""Small Mixture-of-Experts models, and the routes of one as transformers computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, Glm4MoeConfig

from tests.contracts.engine_cases import TINY, ask
from verst.protocols import Engine
from verst.rollout.boundary import checked_experts, checked_generation
from verst.types import GenerateRequest, Generation, RoutedExperts

DENSE_FIRST = Glm4MoeConfig(
    **{**TINY, "num_hidden_layers": 3, "eos_token_id": None},
    head_dim=8,  # type: ignore[call-arg]
    moe_intermediate_size=24,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
KIND = RoutedExperts(layers=3, experts=6, chosen=2)


@torch.no_grad()
def computed_routes(tokens_T: NDArray[np.int32], *passes: tuple[torch.nn.Module, int]) -> NDArray[Any]:
    """[end, L, K] expert ids in ascending order of the tokens before the last pass's end.

    Each pass is a model and the token before which it ends; it goes on from the keys and values of the pass before it.
    """
    cache, start, found = DynamicCache(), 0, []
    for model, end in passes:
        ids = torch.from_numpy(tokens_T[None, start:end].astype(np.int64))
        scores = model.model(input_ids=ids, past_key_values=cache, use_cache=True, output_router_logits=True).router_logits  # type: ignore[operator, union-attr]
        found.append(torch.stack([layer.float().topk(KIND.chosen).indices for layer in scores], 1).numpy())
        start = end
    return np.sort(np.concatenate(found), -1)


def asked(id: str, tokens_T: NDArray[np.int32], routes_from: int = 0, seed: int = 0, **sampling: Any) -> GenerateRequest:
    return replace(ask(id, tokens_T, seed, **sampling), routes_from=routes_from)


async def generated(engine: Engine, request: GenerateRequest) -> Generation:
    """The generation, which keeps the contract and whose routes are sorted like those of `computed_routes`."""
    found = checked_generation(await engine.generate(request), request)
    assert engine.routed_experts == KIND
    experts = checked_experts(found, request, KIND)
    assert experts.dtype == np.uint8
    return replace(found, experts_RLK=np.sort(experts, -1))


def joined(request: GenerateRequest, *answers: Generation) -> NDArray[np.int32]:
    """All tokens of a request that was answered in pieces."""
    return np.concatenate([request.tokens_T, *(answer.tokens_T for answer in answers)])


def rows_of(answers: Sequence[Generation]) -> NDArray[Any]:
    return np.concatenate([answer.experts_RLK for answer in answers if answer.experts_RLK is not None])
