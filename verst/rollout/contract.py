"""What every environment must keep, as a check that anyone runs on their own: `verst.testing.check_environment`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from verst.errors import EnvironmentFailure
from verst.protocols import Environment
from verst.rollout.boundary import GuardedEnvironment
from verst.rollout.user_loop import UserLoop
from verst.types import Completion, FinishReason, Prompt, Reply

_LAST_S = 5.0


async def check_environment(
    make: Callable[[], Environment], prompts: Sequence[Prompt], texts: Sequence[str], *, ends: bool = True, deadline_s: float = 60.0
) -> list[list[Reply]]:
    """The contract of an environment, run on yours. Returns its replies to `texts`, for each prompt.

    It starts, replies and closes; ends; two conversations at the same time do not disturb each other, as every trajectory has its own
    instance; a completion that was cut by its limit of tokens gets a reply; a conversation that ends before its time, or is cancelled while
    a reply is awaited, can be closed.

    Args:
        make: the class, or a function that makes one; `functools.partial` binds options.
        prompts: at least one.
        texts: what a model might say, turn by turn. What comes after the end is not said.
        ends: whether one of `texts` ends the conversation. False: only `rollout.max_turns` would.
        deadline_s: limit of each call.

    Raises `EnvironmentFailure` if a call raises, takes too long or returns what the protocol does not allow, and `AssertionError` for all
    else. Both say what was expected.
    """
    assert prompts, "expected at least one prompt to begin with"
    assert texts, "expected at least one text that a model might say"

    users = UserLoop()  # ends where it is not used any more

    def guarded() -> GuardedEnvironment:
        return GuardedEnvironment(make, deadline_s, users)

    replies: list[list[Reply]] = []
    for prompt in prompts:
        replies.append(await _two_at_once(guarded(), guarded(), prompt, texts))
        last = replies[-1][-1]
        assert last.done or not ends, (
            f"expected one of the {len(texts)} texts to end the conversation about {prompt.id}, but the last reply was {last}: give texts "
            "that end it, or ends=False if only rollout.max_turns does"
        )
        for text in (texts[0][: len(texts[0]) // 2], ""):
            await _truncated(guarded(), prompt, text)
        await _left_alone(guarded(), prompt)
        await _cancelled(guarded(), prompt, texts[0])
    return replies


async def _two_at_once(first: GuardedEnvironment, second: GuardedEnvironment, prompt: Prompt, texts: Sequence[str]) -> list[Reply]:
    opening, other_opening = await first.start(prompt), await second.start(prompt)
    assert opening == other_opening, f"expected two instances to open {prompt.id} alike, but they said {opening} and {other_opening}"
    replies: list[Reply] = []
    for number, text in enumerate(texts, start=1):
        completion = Completion(text, (number,), FinishReason.STOP)
        replies.append(await first.reply(completion))
        other = await second.reply(completion)
        assert other == replies[-1], (
            f"expected two instances to answer alike, but they answered {text!r} differently in turn {number}: {replies[-1]} and {other}. "
            "Each trajectory has an instance of its own: keep its state in it"
        )
        if other.done:
            break
    await _closed(first)
    await _closed(second)
    return replies


async def _truncated(environment: GuardedEnvironment, prompt: Prompt, text: str) -> None:
    await environment.start(prompt)
    try:
        await environment.reply(Completion(text, (1,), FinishReason.LENGTH))
    except EnvironmentFailure as failure:
        raise EnvironmentFailure(
            f"{failure}. Expected a reply to {text!r}, which was cut by its limit of tokens: the trajectory ends there, but its reward may "
            "need the reply's info"
        ) from failure
    await _closed(environment)


async def _left_alone(environment: GuardedEnvironment, prompt: Prompt) -> None:
    """Its engine may fail before the first completion."""
    await environment.start(prompt)
    await _closed(environment)


async def _cancelled(environment: GuardedEnvironment, prompt: Prompt, text: str) -> None:
    await environment.start(prompt)
    replying = asyncio.create_task(environment.reply(Completion(text, (1,), FinishReason.STOP)))
    await asyncio.sleep(0.01)
    replying.cancel()
    await asyncio.wait({replying}, timeout=_LAST_S)
    assert replying.done(), (
        f"expected {environment.name}.reply to end when it is cancelled, but it went on for {_LAST_S:g} s: let asyncio.CancelledError pass"
    )
    if not replying.cancelled():
        await replying  # it had replied before; a failure is told
    await _closed(environment)


async def _closed(environment: GuardedEnvironment) -> None:
    failure = await environment.close()
    if failure is not None:
        raise failure
