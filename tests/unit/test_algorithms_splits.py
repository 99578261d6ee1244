"""The gradient of an update is the same however its samples are divided: microbatches, ranks, padding, neighbours."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.algorithms.aggregate import token_weights
from verst.algorithms.losses import TEACHER, LossInputs
from verst.algorithms.table import ALGORITHMS, Algorithm, algorithm_for
from verst.config.algorithms import PRESETS, AlgorithmConfig, DpoConfig, PolicyGradientConfig
from verst.data.packing import plan_step
from verst.training.logprobs import token_logprobs

VOCAB, HIDDEN = 29, 8
LENGTHS = (3, 9, 5, 2, 12, 7, 4, 11, 6, 8)
GROUPS = (0, 0, 0, 1, 1, 1, 1, 2, 2, 2)
TRAJECTORIES = (0, 1, 1, 2, 3, 4, 4, 5, 6, 7)  # the second and the fifth have a branch

# Largest |difference| over the largest |gradient|, about ten times the worst of 800 random divisions: sums in another order.
TOLERANCE = {torch.float64: 5e-15, torch.float32: 5e-6}
CASES = [(name, mode) for name in PRESETS if not ALGORITHMS[name].whole_groups for mode in ("token_mean", "sequence_mean", "constant")]


@dataclass(frozen=True)
class Update:
    """Ten sequences and a causal toy model: a hidden state is tanh of the mean of the embeddings so far."""

    algorithm: Algorithm
    options: AlgorithmConfig
    tokens: list[torch.Tensor]
    masks: list[torch.Tensor]
    weights: list[torch.Tensor]
    shifts: dict[str, list[torch.Tensor]]  # old, behaviour and reference log-probabilities, less the present ones
    advantages: torch.Tensor
    embedding: torch.Tensor
    head: torch.Tensor
    teacher: list[torch.Tensor]  # its log-probabilities


@cache
def make_update(name: str, mode: str, dtype: torch.dtype) -> Update:
    draw = np.random.default_rng(0)
    preset, asked = PRESETS[name], dict[str, Any](aggregate=mode)
    if name == "distill":
        asked["teacher"] = "m"
    if issubclass(preset, PolicyGradientConfig):
        asked |= {"kl_coefficient": 0.1, "kl_in": "loss", "kl_estimator": "k3"}
    if "clip_low" in preset.model_fields:
        asked |= {"clip_low": 0.1, "clip_high": 0.15} if name != "gspo" else {"clip_low": 0.02, "clip_high": 0.02}
    options: Any = preset.model_validate(asked)
    masks = [np.array([False, *(draw.random(n - 1) < 0.7)]) for n in LENGTHS]
    masks[3][:] = False  # one sequence has nothing to learn from
    algorithm = algorithm_for(options)
    groups_N = np.array([GROUPS[TRAJECTORIES.index(trajectory)] for trajectory in range(max(TRAJECTORIES) + 1)])
    advantages_N = algorithm.advantages(draw.random(len(groups_N)), groups_N, options)
    return Update(
        algorithm=algorithm,
        options=options,
        tokens=[torch.from_numpy(draw.integers(VOCAB, size=n)) for n in LENGTHS],
        masks=[torch.from_numpy(mask) for mask in masks],
        weights=[torch.from_numpy(w).to(dtype) for w in token_weights(masks, TRAJECTORIES, options.aggregate, 12)],
        shifts={
            name: [torch.from_numpy(draw.normal(0, 0.2, size=n)).to(dtype) for n in LENGTHS]
            for name in ("old_logprobs", "behaviour_logprobs", "reference_logprobs")
        },
        advantages=torch.from_numpy(advantages_N[list(TRAJECTORIES)]).to(dtype),
        embedding=torch.from_numpy(draw.normal(size=(VOCAB, HIDDEN))).to(dtype).requires_grad_(),
        head=torch.from_numpy(draw.normal(size=(VOCAB, HIDDEN))).to(dtype).requires_grad_(),
        teacher=[torch.from_numpy(draw.normal(-2, 0.5, size=n)).to(dtype) for n in LENGTHS],
    )


def gradient(update: Update, microbatches) -> torch.Tensor:
    """Summed over microbatches, and so over ranks."""
    total = torch.zeros(2, VOCAB, HIDDEN, dtype=update.head.dtype)
    for microbatch in filter(None, microbatches):
        total += torch.stack(torch.autograd.grad(weighted_loss(update, list(microbatch)), (update.embedding, update.head)))
    return total


def weighted_loss(update: Update, microbatch: list[int]) -> torch.Tensor:
    def padded(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([values[i] for i in microbatch], batch_first=True)

    tokens, mask = padded(update.tokens), padded(update.masks)
    counts = torch.arange(1, tokens.shape[1] + 1, dtype=update.head.dtype)[:, None]
    hidden = torch.tanh(update.embedding[tokens].cumsum(dim=1) / counts)
    rows, columns = mask.nonzero(as_tuple=True)
    logprobs, _ = token_logprobs(hidden[rows, columns - 1], update.head, tokens[mask], chunk_bytes=1)
    samples = torch.tensor(microbatch)[rows]
    shifted: dict[str, Any] = {name: logprobs.detach() + padded(values)[mask] for name, values in update.shifts.items()}
    inputs = LossInputs(
        logprobs=logprobs,
        advantages=update.advantages[samples],
        samples=samples,
        trajectories=torch.tensor(TRAJECTORIES)[samples],
        fields={TEACHER: padded(update.teacher)[mask]},
        **shifted,
    )
    per_token = update.algorithm.loss(inputs, update.options).per_token
    return (per_token * padded(update.weights)[mask]).sum()


def difference(update: Update, microbatches) -> float:
    whole = gradient(update, [range(len(LENGTHS))])
    return ((gradient(update, microbatches) - whole).abs().max() / whole.abs().max()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@given(owners=st.permutations(range(10)), cuts=st.sets(st.integers(1, 9)), case=st.sampled_from(CASES))
@settings(max_examples=40, deadline=None)
def test_any_division_gives_the_same_gradient(dtype, owners, cuts, case):
    bounds = [0, *sorted(cuts), 10]
    microbatches = [owners[a:b] for a, b in pairwise(bounds)]
    assert difference(make_update(*case, dtype), microbatches) < TOLERANCE[dtype]


@pytest.mark.parametrize(("ranks", "packed"), [(1, False), (2, True), (3, False), (12, True)])
@pytest.mark.parametrize("microbatch_tokens", [12, 40, 1000])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_planned_steps_give_the_same_gradient(case, microbatch_tokens, ranks, packed):
    plan = plan_step(LENGTHS, GROUPS, minibatches=1, epochs=1, ranks=ranks, microbatch_tokens=microbatch_tokens, packed=packed)
    microbatches = [m for rank in plan.updates[0].ranks for m in rank]
    assert difference(make_update(*case, torch.float64), microbatches) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if "clip_low" in preset.model_fields])
def test_the_bounds_act_in_the_toy_update(name):
    """Else a ratio taken over a part of a sample would not show."""
    update = make_update(name, "token_mean", torch.float64)
    clipped = gradient(update, [range(10)])
    loose = replace(update, options=update.options.model_copy(update={"clip_low": 1.0, "clip_high": 1e9}))
    assert (gradient(loose, [range(10)]) - clipped).abs().max() > 1e-3 * clipped.abs().max()


def test_the_toy_update_exercises_what_it_should():
    # Clipping and KL act, some tokens are padding, and averaging microbatches would have shown.
    update = make_update("grpo", "token_mean", torch.float64)
    whole = gradient(update, [range(10)])
    assert whole.abs().max() > 1e-2
    halves = gradient(update, [range(5)]) / 0.5, gradient(update, [range(5, 10)]) / 0.5  # as if each half were all
    counts = [sum(int(update.masks[i].sum()) for i in part) for part in (range(5), range(5, 10))]
    assert counts[0] != counts[1]
    means = sum(half * sum(counts) / (2 * count) for half, count in zip(halves, counts, strict=True)) / 2
    assert ((means - whole).abs().max() / whole.abs().max()).item() > 0.01


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatch_tokens", [33, 60, 1000])
def test_planned_pairs_give_the_same_gradient(microbatch_tokens, ranks, packed):
    base = make_update("sft", "sequence_mean", torch.float64)
    masks = [mask if mask.any() else torch.arange(len(mask)) > 0 for mask in base.masks]
    weights = [torch.from_numpy(w).double() for w in token_weights([mask.numpy() for mask in masks], TRAJECTORIES, "sequence_mean", 12)]
    signs = torch.tensor([1.0, -1.0] * 4).double()[list(TRAJECTORIES)]
    update = replace(base, algorithm=ALGORITHMS["dpo"], options=DpoConfig(), masks=masks, weights=weights, advantages=signs)
    pairs = [trajectory // 2 for trajectory in TRAJECTORIES]
    plan = plan_step(
        LENGTHS, pairs, minibatches=1, epochs=1, ranks=ranks, microbatch_tokens=microbatch_tokens, packed=packed, whole_groups=True
    )
    microbatches = [m for rank in plan.updates[0].ranks for m in rank]
    assert len(list(filter(None, microbatches))) > 1 or microbatch_tokens == 1000
    assert difference(update, microbatches) < TOLERANCE[torch.float64]
