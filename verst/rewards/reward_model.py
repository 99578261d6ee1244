"""A model trained to score answers: transformers' sequence classification with one label, in the reward process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.errors import ExtensionError, RewardFailure
from verst.isolated.served import attempt
from verst.rewards.conversation import as_dicts, as_text
from verst.types import Trajectory

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda")


class RewardModel:
    """The logit that the model gives the conversation, by its own chat template; the contents joined if it has none.

    path: a directory. device: "cpu", or "cuda" where `reward.actor_gpus` gives it a GPU. dtype: of its weights. max_batch: conversations
    of one forward pass; those that arrive together go together. max_tokens: a longer conversation fails, rather than be judged by a part
    of it; default: what the model says it can take.

    A score may differ in its last digits with the neighbours in a batch; with `max_batch: 1` it does not.
    """

    def __init__(self, path: str, dtype: str = "float32", max_batch: int = 16, max_tokens: int | None = None, device: str = "cpu") -> None:
        if not (Path(path) / "config.json").is_file():
            raise ExtensionError(f"reward_model: {path!r} has no config.json: give the directory of a model that transformers can load")
        if device not in _DEVICES:
            raise ExtensionError(f"reward_model: device is {device!r}; it must be one of {', '.join(_DEVICES)}")
        if dtype not in _DTYPES:
            raise ExtensionError(f"reward_model: dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        if max_batch < 1 or (max_tokens is not None and max_tokens < 1):
            raise ExtensionError("reward_model: max_batch and max_tokens must be at least 1")
        self._path, self._dtype, self._device, self._max_batch, self._max_tokens = path, dtype, device, max_batch, max_tokens
        self._waiting: list[tuple[list[int], asyncio.Future[float]]] = []
        self._running: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Loads the model. Raises `ExtensionError` if it cannot be loaded or does not give one score."""
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        if self._device == "cuda" and not torch.cuda.is_available():
            raise ExtensionError("reward_model: device is cuda, and this process has no GPU: give it one by reward.actor_gpus")
        try:
            config = AutoConfig.from_pretrained(self._path, local_files_only=True)
            if config.num_labels != 1:
                raise ExtensionError(f"reward_model: {self._path} has {config.num_labels} labels: a reward model has one")
            self._tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True)
            self._model, report = AutoModelForSequenceClassification.from_pretrained(
                self._path, dtype=getattr(torch, self._dtype), local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ExtensionError(f"reward_model: {self._path} cannot be loaded: {error}") from error
        if report["missing_keys"]:  # its head would be random numbers
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise ExtensionError(f"reward_model: {self._path} has no weights for {missing}: it is no sequence classification model")
        self._known = self._model.get_input_embeddings().num_embeddings
        self._pad(config)
        self._model.eval().to(self._device)
        self._room = self._max_tokens or getattr(config, "max_position_embeddings", None)

    def _pad(self, config: Any) -> None:
        """The model takes its logit at the last token that is not this one, so one that a conversation may hold would move it."""
        pad = self._tokenizer.pad_token_id
        if pad is None:
            pad = config.pad_token_id
        if pad is None and self._max_batch > 1:
            raise ExtensionError(f"reward_model: {self._path} has no padding token: set pad_token in its tokenizer, or max_batch to 1")
        if pad is not None and pad >= self._known and self._max_batch > 1:
            raise ExtensionError(
                f"reward_model: {self._path} pads with token {pad}, and knows those below {self._known}: set another pad_token in its "
                "tokenizer, or max_batch to 1"
            )
        self._pad_id = self._model.config.pad_token_id = pad

    async def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        tokens = self._tokens(trajectory)
        if self._room is not None and len(tokens) > self._room:
            raise RewardFailure(f"the conversation has {len(tokens)} tokens, and the reward model takes {self._room}")
        largest = max(tokens, default=0)
        if largest >= self._known:  # a tokenizer may have more; a whole batch would break of it, and on a GPU the process
            raise RewardFailure(f"the conversation has token {largest}, and the reward model knows those below {self._known}")
        score = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, score))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await score

    def _tokens(self, trajectory: Trajectory) -> list[int]:
        if self._tokenizer.chat_template is None:
            return self._tokenizer(as_text(trajectory.messages))["input_ids"]
        return self._tokenizer.apply_chat_template(as_dicts(trajectory.messages), return_dict=True)["input_ids"]

    async def _run(self) -> None:
        await asyncio.sleep(0)  # those that arrived with the first are behind it in the loop
        while self._waiting:
            batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            await self._score([(tokens, score) for tokens, score in batch if not score.done()])

    async def _score(self, batch: Sequence[tuple[list[int], asyncio.Future[float]]]) -> None:
        if not batch:
            return  # their callers' deadlines have passed
        found, error = await asyncio.to_thread(attempt, partial(self._forward, [tokens for tokens, _ in batch]))
        for place, (_, score) in enumerate(batch):
            if score.done():
                continue
            if error is None:
                score.set_result(found[place])
            else:  # whatever it is: a caller that is not told waits for its whole deadline, and so do those that come later
                reason = f"the reward model broke on a batch of {len(batch)}: {type(error).__name__}: {error}"
                score.set_exception(RewardFailure(reason))

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        import torch

        longest = max(map(len, rows))
        ids_BT = torch.tensor([[*row, *[self._pad_id or 0] * (longest - len(row))] for row in rows], device=self._device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self._device)
        with torch.inference_mode():
            logits_B1: torch.Tensor = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return logits_B1[:, 0].float().tolist()
