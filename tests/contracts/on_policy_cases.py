"""What the on-policy tests of CPU and GPU share: rollouts as the samples of a batch, the trainer's view of them, and who differs first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedConfig

from tests.contracts.engine_cases import ask, prompt, save_model
from tests.unit.fsdp_cases import make_config
from verst.protocols import Engine
from verst.rollout.hf.model import SlotModel
from verst.routing.records import routes_of
from verst.training.fsdp import FsdpBackend
from verst.training.microbatch import collate
from verst.types import NO_VERSION, Batch, GenerateRequest, Generation, Sample

PROMPT_LENGTHS = (3, 9, 30, 61, 64, 5, 17)
NEW_TOKENS = (5, 12, 70)


def save_with_tokenizer(path: Path, config: PreTrainedConfig) -> Path:
    save_model(path, config)
    Tokenizer(WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0")).save(str(path / "tokenizer.json"))
    return path


def requests(temperature: float, groups: int = 7, **sampling: Any) -> list[GenerateRequest]:
    """Groups of three that share a prompt; prompts and answers have many lengths."""
    return [
        replace(
            ask(
                f"{group}/{member}",
                prompt(group, length=PROMPT_LENGTHS[group % len(PROMPT_LENGTHS)]),
                seed=3 * group + member,
                max_new_tokens=NEW_TOKENS[member],
                temperature=temperature,
                **sampling,
            ),
            routes_from=0,
        )
        for group in range(groups)
        for member in range(3)
    ]


async def sampled(engine: Engine, asked: Sequence[GenerateRequest]) -> list[Sample]:
    """One sample for each request, all generated at once."""
    return [as_sample(r, g) for r, g in zip(asked, await asyncio.gather(*map(engine.generate, asked)), strict=True)]


def as_sample(request: GenerateRequest, generation: Generation, *, behind: Sample | None = None) -> Sample:
    """The request's tokens and those generated. `behind`: a sample whose tokens the request's begin with, for the turns so far."""
    tokens_T = np.concatenate((request.tokens_T, generation.tokens_T))
    new_T = np.arange(len(tokens_T)) >= len(request.tokens_T)
    logprobs_T = np.zeros(len(tokens_T), np.float32)
    logprobs_T[new_T] = generation.logprobs_T
    mask_T = new_T.copy()
    if behind is not None:
        mask_T[: len(behind.loss_mask_T)] = behind.loss_mask_T
        logprobs_T[: len(behind.loss_mask_T)] = behind.behaviour_logprobs_T
    return Sample(
        id=request.id,
        group=int(request.id.split("/")[0]),
        tokens_T=tokens_T,
        loss_mask_T=mask_T,
        behaviour_logprobs_T=logprobs_T,
        versions_T=np.where(mask_T, 0, NO_VERSION).astype(np.int32),
        reward=float(len(tokens_T) % 3),
        routes=None if generation.experts_RLK is None else routes_of(tokens_T, generation.experts_RLK),
    )


def trained(
    path: Path, samples: Sequence[Sample], temperature: float, *, device: str = "cpu", dtype: str = "float32", **train: Any
) -> tuple[FsdpBackend, dict[str, float]]:
    """A backend, and what it reports of one update on these samples, its gradients included."""
    config = make_config(
        str(path),
        model={"dtype": dtype},
        rollout={"temperature": temperature, "max_new_tokens": 80},
        data={"max_prompt_tokens": 70},
        train={"microbatch_tokens": 400, **train},
    )
    backend = FsdpBackend(config, rank=0, world=1, device=device)
    tally = backend.load_batch(Batch(1, tuple(sorted({s.group for s in samples})), tuple(samples))).tally
    tally.merge(backend.forward_backward(0, [1.0 - (n % 2) * 2 for n in range(len(samples))]))
    return backend, tally.report()


# ---- which module differs first


@contextmanager
def outputs_of(model: torch.nn.Module, place: int, row: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, keeps what every module gave the token at `place` of `row`, in order."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor) and output.ndim >= 3:
            found[name] = output[min(row, len(output) - 1), min(place, output.shape[1] - 1)].detach().float().cpu()

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if not list(module.children()) or name.endswith(("self_attn", "mlp"))
    ]
    yield found
    for hook in hooks:
        hook.remove()


def first_differences(path: Path, tokens_T: NDArray[np.int32], *, device: str = "cpu", dtype: str = "float32") -> str:
    """The first module whose bits differ between trainer and decoding, and between trainer and prefill, for the last token."""
    last = len(tokens_T) - 1
    backend, _ = trained(path, [_whole(tokens_T)], 1.0, device=device, dtype=dtype)
    policy = backend._policy
    microbatch = collate([_whole(np.append(tokens_T, 1).astype(np.int32))], (0,), torch.device(device), policy.multiple)
    with outputs_of(policy.model, last) as trainer, torch.no_grad():
        policy(microbatch.tokens_BT, microbatch.positions_N, microbatch.targets_N, 1.0)
    model = SlotModel(str(path), getattr(torch, dtype), torch.device(device), slots=16, max_tokens=len(tokens_T) + 2, exact=True)
    model._graphs.enabled = False
    with outputs_of(model.model, last) as prefilled:
        model.prefill(tokens_T, 3)
    model.prefill(tokens_T[:-1], 3)
    active = np.arange(model.rows) == 3
    with outputs_of(model.model, 0, row=3) as decoded:
        model.decode(np.full(model.rows, tokens_T[-1]), np.full(model.rows, last), active)
    return f"prefill: {_first(trainer, prefilled)}; decoding: {_first(trainer, decoded)}"


def _whole(tokens_T: NDArray[np.int32]) -> Sample:
    mask_T = np.arange(len(tokens_T)) > 0
    zeros_T = np.zeros(len(tokens_T), np.float32)
    return Sample("0/0", 0, tokens_T, mask_T, zeros_T, np.where(mask_T, 0, NO_VERSION).astype(np.int32), 0.0)


def _first(trainer: dict[str, torch.Tensor], engine: dict[str, torch.Tensor]) -> str:
    shared: Iterable[str] = [name for name in trainer if name in engine and trainer[name].shape == engine[name].shape]
    for name in shared:
        if not torch.equal(trainer[name], engine[name]):
            return f"{name} differs by up to {(trainer[name] - engine[name]).abs().max().item():.1e}"
    return f"all {len(list(shared))} modules agree"
