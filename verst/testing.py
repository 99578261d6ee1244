"""Fakes and a tiny model for people's own tests: no GPU, no network, no weights to download.

`FakeEngine` and `FakeEnvironment` do what a script says and record what happened in order. `tiny_tokenizer` and `tiny_model` make real
ones, small enough to train in a test. `check_environment`, `check_rollout`, `check_reward`, `check_advantages`, `check_loss`,
`check_filter`, `check_hook` and `check_model_spec` are the contracts that yours must keep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst.algorithms.contract import check_advantages as check_advantages
from verst.algorithms.contract import check_loss as check_loss
from verst.errors import EngineFailure, InvariantViolation
from verst.filters.contract import check_filter as check_filter
from verst.filters.contract import make_group as make_group
from verst.hooks import check_hook as check_hook
from verst.model_contract import check_model_spec as check_model_spec
from verst.protocols import WeightUpdate
from verst.rewards.contract import check_reward as check_reward
from verst.rollout.contract import check_environment as check_environment  # what people's tests import from here
from verst.rollout.rollouts_contract import check_rollout as check_rollout
from verst.types import Completion, FinishReason, GenerateRequest, Generation, Message, PauseMode, Prompt, Reply, RoutedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from verst.weights.group import GroupAddress

Completer = Callable[[GenerateRequest], Sequence[int]]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class FakeEngine:
    """An `Engine` that says what it is told to, one token a tick, and records every event in order in `events`.

    Args:
        completions: token ids of each request in the order of admission (the last one is repeated), or a function of the request. They are
            cut at `max_new_tokens` with `FinishReason.LENGTH`, otherwise they finish with `STOP`.
        tick_s: seconds each token takes.
        fail_at: the request (counted from 0) whose `generate` raises `EngineFailure` after its first token.
        stall_at: the request that never ends by itself; an abort or a cancellation ends it.
        routed_experts: record routes as a model that routes so would; see `experts`.
    """

    def __init__(
        self,
        completions: Completer | Sequence[Sequence[int]],
        *,
        tick_s: float = 0.0,
        fail_at: int | None = None,
        stall_at: int | None = None,
        routed_experts: RoutedExperts | None = None,
    ) -> None:
        self.routed_experts = routed_experts
        self.events: list[tuple[str, Any]] = []
        self.requests: list[GenerateRequest] = []
        self.weights: dict[str, Any] = {}
        self._completions = completions
        self._tick_s = tick_s
        self._fail_at = fail_at
        self._stall_at = stall_at
        self._running: set[str] = set()
        self._so_far: dict[str, Callable[[], Generation]] = {}
        self._aborted: set[str] = set()
        self._paused = False
        self._changed = asyncio.Condition()  # an abort, a resume or a token happened
        self._version = 0
        self._generated_tokens = 0

    @staticmethod
    def logprob(token: int) -> float:
        """The log-probability this engine reports for a token, wherever it stands."""
        return -(token % 7 + 1) / 8

    @staticmethod
    def experts(place: int, number: int, kind: RoutedExperts) -> NDArray[np.int32]:
        """[L, K] experts that the request of this number (counted from 0) sends the token at a place to: no two passes agree."""
        first = place + 3 * number + np.arange(kind.layers)
        return ((first[:, None] + np.arange(kind.chosen)) % kind.experts).astype(np.int32)

    @property
    def version(self) -> int:
        return self._version

    async def start(self) -> None:
        self.events.append(("start", None))

    async def generate(self, request: GenerateRequest) -> Generation:
        if request.id in self._running:
            raise EngineFailure(f"request {request.id} is running already")
        number = len(self.requests)
        self.requests.append(request)
        self.events.append(("generate", request.id))
        self._running.add(request.id)
        try:
            return await self._decode(request, number)
        finally:
            self._running.discard(request.id)
            self._so_far.pop(request.id, None)
            self._aborted.discard(request.id)

    async def generated(self, tokens: int) -> None:
        """Returns once this many tokens were generated in all: the moment for a test to interfere."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._generated_tokens >= tokens)

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        ended = sorted(self._running if ids is None else self._running & set(ids))
        self.events.append(("abort", tuple(ended)))
        self._aborted.update(ended)
        async with self._changed:
            self._changed.notify_all()

    async def in_flight(self) -> Sequence[Generation]:
        return [so_far() for so_far in self._so_far.values()]

    async def pause(self, mode: PauseMode = PauseMode.IN_PLACE) -> None:
        """Keys and values are nothing here, so to retract is to pause."""
        self.events.append(("pause", mode.value))
        self._paused = True
        if mode is PauseMode.ABORT:
            await self.abort()

    async def resume(self) -> None:
        self.events.append(("resume", None))
        self._paused = False
        async with self._changed:
            self._changed.notify_all()

    async def update_weights(self, update: WeightUpdate) -> Mapping[str, str]:
        """Keeps copies of the tensors in `weights`. Raises `InvariantViolation` unless paused."""
        if not self._paused:
            raise InvariantViolation(f"update to version {update.manifest.version} of an engine that is not paused")
        self.events.append(("update", update.manifest.version))
        checksums = {}
        for name, tensor in update.tensors():
            self.weights[name] = tensor.clone()
            checksums[name] = update.checksum(self.weights[name])
        self._version = update.manifest.version
        return checksums

    async def release_memory(self, *, weights: bool = True) -> None:
        """Raises `InvariantViolation` unless paused."""
        if not self._paused:
            raise InvariantViolation("memory of an engine that is not paused was to be released")
        self.events.append(("release_memory", weights))

    async def resume_memory(self) -> None:
        self.events.append(("resume_memory", None))

    @property
    def weight_ranks(self) -> int:
        return 1

    async def join_weight_group(self, address: GroupAddress, first_rank: int, timeout_s: float) -> None:
        self.events.append(("join", (address, first_rank, timeout_s)))

    async def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.asarray([0.0, *(self.logprob(int(token)) for token in tokens_T[1:])], np.float32)[: len(tokens_T)]

    def stats(self) -> Mapping[str, float]:
        zero = dict.fromkeys(("prefill_tokens", "decode_steps", "decode_s", "prefill_s", "waiting"), 0.0)
        generated = float(self._generated_tokens)
        return zero | {"generated_tokens": generated, "processed_tokens": generated, "running": float(len(self._running))}

    async def check(self) -> None: ...

    async def close(self) -> None:
        self.events.append(("close", None))

    async def _decode(self, request: GenerateRequest, number: int) -> Generation:
        planned = self._planned(request, number)
        tokens: list[int] = []
        versions: list[int] = []
        self._so_far[request.id] = lambda: self._generation(request, number, tokens, versions, FinishReason.ABORT)
        finish = FinishReason.LENGTH if len(planned) > request.sampling.max_new_tokens else FinishReason.STOP
        for token in planned[: request.sampling.max_new_tokens]:
            await self._tick(request.id, stall=number == self._stall_at)
            if request.id in self._aborted:
                finish = FinishReason.ABORT
                break
            if number == self._fail_at and tokens:
                break
            tokens.append(token)
            versions.append(self._version)
            await self._count()
        if number == self._fail_at:
            self.events.append(("fail", request.id))
            raise EngineFailure(f"fake engine: told to fail at request {number} ({request.id})")
        self.events.append(("finish", request.id))
        return self._generation(request, number, tokens, versions, finish)

    def _generation(
        self, request: GenerateRequest, number: int, tokens: Sequence[int], versions: Sequence[int], finish: FinishReason
    ) -> Generation:
        logprobs_T = np.asarray([self.logprob(token) for token in tokens], np.float32)
        experts_RLK = self._routes(request, number, len(tokens))
        return Generation(request.id, np.asarray(tokens, np.int32), logprobs_T, np.asarray(versions, np.int32), finish, experts_RLK)

    def _routes(self, request: GenerateRequest, number: int, generated: int) -> NDArray[np.int32] | None:
        kind = self.routed_experts
        if kind is None or request.routes_from is None:
            return None
        places = range(request.routes_from, len(request.tokens_T) + generated - 1)
        return np.stack([self.experts(place, number, kind) for place in places])

    async def _count(self) -> None:
        async with self._changed:
            self._generated_tokens += 1
            self._changed.notify_all()

    def _planned(self, request: GenerateRequest, number: int) -> Sequence[int]:
        if callable(self._completions):
            return self._completions(request)
        return self._completions[min(number, len(self._completions) - 1)]

    async def _tick(self, request_id: str, *, stall: bool) -> None:
        await asyncio.sleep(self._tick_s)
        async with self._changed:
            await self._changed.wait_for(lambda: request_id in self._aborted or not (stall or self._paused))


class FakeEnvironment:
    """An `Environment` that answers from a script and records what it was asked in `calls`.

    Args:
        replies: what `reply` returns, one after the other; an exception among them is raised, any other object is returned as it is.
        opening: what `start` returns or raises. None: the prompt's messages.
        delay_s: seconds each reply takes.
    """

    def __init__(self, replies: Sequence[Any] = (Reply(),), opening: Any = None, delay_s: float = 0.0) -> None:
        self.calls: list[Prompt | Completion | str] = []
        self._replies = list(replies)
        self._opening = opening
        self._delay_s = delay_s

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        self.calls.append(prompt)
        return prompt.messages if self._opening is None else _given(self._opening)

    async def reply(self, completion: Completion) -> Reply:
        self.calls.append(completion)
        await asyncio.sleep(self._delay_s)
        return _given(self._replies.pop(0))

    async def close(self) -> None:
        self.calls.append("close")


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens: every byte, `<|im_end|>` (end of sequence), `<|endoftext|>` (padding) and `<|im_start|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_names = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(byte_names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(directory: str | Path, *, seed: int = 0, kind: Callable[[Any], Any] | None = None, **overrides: Any) -> Path:
    """Writes a random Llama of about 0.03 million parameters with `tiny_tokenizer` as a Hugging Face directory, and returns its path.

    Args:
        seed: of the initial weights. PyTorch's global random numbers are left as they were.
        kind: the class of transformers that makes the model from its config. Default: `LlamaForCausalLM`.
        overrides: fields of `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = Path(directory)
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (kind or LlamaForCausalLM)(LlamaConfig(**(fields | overrides)))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _given(value: Any) -> Any:
    if isinstance(value, BaseException):
        raise value
    return value
