"""What every rollout function must keep, as a check that anyone runs on their own: `verst.testing.check_rollout`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from verst.data.chat import ChatRenderer
from verst.protocols import Engine
from verst.rollout.recorded import Piece, Recorded
from verst.rollout.roll import GroupRoller
from verst.rollout.rollouts import Rollouts
from verst.rollout.user_loop import UserLoop
from verst.types import FinishReason, GenerateRequest, Generation, Prompt, Sampling, Status, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_S = 5.0
_WHOLE_TOKENS = 4096


class _Says:
    """As much of an engine as rolling needs: says a text in each turn, and keeps what it was asked. Cuts at the limit of tokens."""

    version = 0
    routed_experts = None

    def __init__(self, renderer: ChatRenderer, texts: Sequence[str], stall_at: int | None = None) -> None:
        self.pieces: list[Piece] = []
        self.requests = 0
        self.stalled = asyncio.Event()
        self._renderer, self._texts, self._stall_at = renderer, texts, stall_at

    def stats(self) -> Mapping[str, float]:
        return {}

    async def abort(self, ids: Sequence[str] | None = None) -> None: ...

    async def generate(self, request: GenerateRequest) -> Generation:
        self.requests += 1
        turn = int(request.id.rpartition("/")[2])
        if turn == self._stall_at:
            self.stalled.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)  # others have their turn
        ids = self._renderer.tokenizer.encode(self._texts[min(turn, len(self._texts) - 1)], add_special_tokens=False)
        end, limit = self._renderer.end_of_turn, request.sampling.max_new_tokens
        whole = [*ids, *([] if end is None else [end])]
        tokens_T = np.asarray(whole[:limit], np.int32)
        finish = FinishReason.LENGTH if len(whole) > limit else FinishReason.STOP
        return Generation(request.id, tokens_T, np.full(len(tokens_T), -0.5, np.float32), np.zeros(len(tokens_T), np.int32), finish)


async def check_rollout(
    function: Any,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_turns: int = 8,
    max_new_tokens: int = 256,
    deadline_s: float = 60.0,
    **options: Any,
) -> list[Trajectory]:
    """The contract of a rollout function, run on yours with an engine that says `texts`, turn by turn (the last one is repeated).

    It ends by itself; it does the same once more, beside another one, and where the completions are known of an engine that was lost; a
    completion that is cut after one token does not break it; it ends when it is cancelled. Returns the trajectory of each prompt.

    Args:
        function: the function, or the `Rollouts` made of it.
        tokenizer: the model's; `verst.testing.tiny_tokenizer()` serves where it does not matter.
        max_turns, max_new_tokens: as in `rollout`.
        deadline_s: limit of each pause between two completions.
        options: as in `rollout.environment_options`.

    Raises `ExtensionError` if its signature does not fit, and `AssertionError` that says what was expected for all else.
    """
    assert prompts, "expected at least one prompt to begin with"
    assert texts, "expected at least one text that a model might say"
    rollouts = function if isinstance(function, Rollouts) else Rollouts(function, **options)
    renderer, users = ChatRenderer(tokenizer), UserLoop()

    def roller(engine: _Says, limit: int = max_new_tokens) -> GroupRoller:
        return GroupRoller(
            cast(Engine, engine),
            renderer,
            rollouts,
            sampling=Sampling(limit),
            group_size=2,
            max_turns=max_turns,
            max_prompt_tokens=_WHOLE_TOKENS,
            max_model_tokens=_WHOLE_TOKENS + max_turns * max_new_tokens,
            seed=0,
            environment_deadline_s=deadline_s,
            users=users,
        )

    found = []
    for seq, prompt in enumerate(prompts):
        engine = _Says(renderer, texts)
        first, beside = (await roller(engine).roll(seq, prompt)).trajectories
        _require_whole(first, prompt)
        _require_same(first, beside, "two trajectories of one prompt, at the same time and with the same completions,")
        await _check_again(roller, seq, prompt, first, renderer, texts)
        (cut, *_) = (await roller(_Says(renderer, texts), 1).roll(seq, prompt)).trajectories
        assert cut.status is not Status.FAILED, f"expected an end also where a completion is cut after one token; {cut.error}"
        await _check_cancelled(roller(stalling := _Says(renderer, texts, stall_at=0)), stalling, seq, prompt)
        found.append(first)
    return found


def _require_whole(trajectory: Trajectory, prompt: Prompt) -> None:
    assert trajectory.status is not Status.FAILED, f"expected a trajectory of {prompt.id}; {trajectory.error}"
    assert trajectory.turns, f"expected at least one completion for {prompt.id}"


def _require_same(first: Trajectory, second: Trajectory, what: str) -> None:
    assert second.status is not Status.FAILED, f"expected {what} to end alike; {second.error}"
    same = np.array_equal(first.tokens_T, second.tokens_T) and np.array_equal(first.loss_mask_T, second.loss_mask_T)
    assert same, f"expected {what} to have the same tokens, but they have {first.tokens_T.tolist()} and {second.tokens_T.tolist()}"
    assert first.info == second.info, f"expected {what} to have the same info, but they have {first.info} and {second.info}"


async def _check_again(roller: Any, seq: int, prompt: Prompt, first: Trajectory, renderer: ChatRenderer, texts: Sequence[str]) -> None:
    """Once more, by itself; and then from what is known of that, as where an engine was lost."""
    recorded = Recorded(cast(Engine, _Says(renderer, texts)))
    (alone, *_) = (await roller(_Says(renderer, texts)).roll(seq, prompt, recorded=recorded)).trajectories
    _require_same(first, alone, "the same completions to the same prompt, given once more,")
    engine = _Says(renderer, texts)
    again = Recorded(cast(Engine, engine), recorded.all({}))
    (resumed, *_) = (await roller(engine).roll(seq, prompt, recorded=again)).trajectories
    _require_same(first, resumed, "the trajectory, once more from completions that are known,")
    assert not engine.requests, (
        f"expected it to ask for the same tokens when it is called anew, but it asked {engine.requests} times for others"
    )


async def _check_cancelled(roller: GroupRoller, engine: _Says, seq: int, prompt: Prompt) -> None:
    rolling = asyncio.create_task(roller.roll(seq, prompt))
    await asyncio.wait_for(engine.stalled.wait(), _LAST_S)
    rolling.cancel()
    done, _ = await asyncio.wait({rolling}, timeout=_LAST_S)
    assert done, f"expected the rollout to end when it is cancelled, but it went on for {_LAST_S:g} s: let asyncio.CancelledError pass"
