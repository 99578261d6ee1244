"""Where environments and engines cross into Verst: what they return is checked here, and what an environment raises ends here.

A broken environment fails one trajectory, a broken engine is nobody's trajectory's fault. Both are told apart at this place only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.config.text import is_unicode
from verst.errors import EngineFailure, EnvironmentFailure, RoutesRefused
from verst.extend import described, origin
from verst.fields import apart, checked
from verst.protocols import Environment
from verst.rollout.tokens import Asked
from verst.rollout.user_loop import GRACE_S, Caller, UserLoop
from verst.routing.records import expert_dtype, narrowed
from verst.types import Completion, GenerateRequest, Generation, Message, Prompt, Reply, RoutedExperts

CLOSE_DEADLINE_S = 10.0
"""A close that hangs must not hold up the end of a cancelled group."""


class GuardedEnvironment:
    """One environment for one trajectory. Whatever goes wrong in it becomes an `EnvironmentFailure` that names it.

    Args:
        make: makes the environment, at `start`.
        deadline_s: limit of each call.
        users: where it runs; default: a loop of its own.
        rolls: the rollout function that it stands for. Then it is Verst's own code and runs here; only the function is in the users' loop.
    """

    def __init__(
        self, make: Callable[[], Environment], deadline_s: float, users: UserLoop | None = None, rolls: Caller | None = None
    ) -> None:
        self._make = make
        self._deadline_s = deadline_s
        self._users = users or UserLoop()
        self._environment: Environment | None = None
        self._caller, self._here = rolls or Caller(f"environment {self.name}"), rolls is not None
        self._calls = 0

    async def start(self, prompt: Prompt) -> tuple[Message, ...] | Asked:
        """Makes the environment and returns its opening messages, at least one; or what a rollout function asks for first."""

        async def made() -> Any:
            self._environment = self._make()
            return await self._environment.start(prompt)

        opening = await self._guarded(made, "start", self._deadline_s)
        if isinstance(opening, Asked):
            return opening
        messages = _checked_messages(opening, f"{self.name}.start")
        if not messages:
            raise EnvironmentFailure(f"{self.name}.start returned no messages: the model has nothing to answer")
        return messages

    async def tools(self) -> tuple[Mapping[str, Any], ...]:
        """What the chat template tells the model that it can call. Raises `EnvironmentFailure` if they are no JSON objects."""

        async def told() -> Any:
            return getattr(self._environment, "tools", ())

        tools = await self._guarded(told, "tools", self._deadline_s)
        if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
            raise EnvironmentFailure(f"environment {self.name}: tools is {described(tools)}, not a sequence of functions in OpenAI's form")
        return tuple(_as_json(list(tools), f"environment {self.name}: tools"))

    async def reply(self, completion: Completion) -> Reply:
        self._calls += 1
        environment = self._environment
        if environment is None:
            raise EnvironmentFailure("an environment was asked for a reply before it started")
        answer = await self._guarded(lambda: environment.reply(completion), f"reply in turn {self._calls}", self._deadline_s)
        return checked_reply(answer, self.name)

    async def close(self) -> EnvironmentFailure | None:
        """Calls the environment's own `close`, if it has one. A failure is returned, so that it hides no other error."""
        if self._environment is None:
            return None

        async def closed() -> None:
            close = getattr(self._environment, "close", None)
            if close is not None:
                await close()

        try:
            await self._guarded(closed, "close", CLOSE_DEADLINE_S)
        except EnvironmentFailure as failure:
            return failure
        return None

    @property
    def name(self) -> str:
        """Of its class or function, as the user wrote it."""
        if (title := getattr(self._make, "title", None)) is not None:  # of a rollout function
            return str(title)
        made = self._make if self._environment is None else type(self._environment)
        made = getattr(made, "func", made)  # a class with its options bound
        return str(getattr(made, "__qualname__", made))

    async def _guarded(self, call: Callable[[], Awaitable[Any]], what: str, deadline_s: float) -> Any:
        work = asyncio.ensure_future(call() if self._here else self._users.run(call, self._caller))
        try:
            in_time = await self._users.within(work, deadline_s, self._caller)
        finally:
            await _ended(work)
        if not in_time:
            raise EnvironmentFailure(f"environment {self.name}: {what} took longer than {deadline_s:g} s")
        return result_of(work, f"environment {self.name}: {what}")


async def _ended(work: asyncio.Future[Any]) -> None:
    """Cancels what is still under way. What does not heed that is left to itself."""
    if not work.done():
        work.add_done_callback(lambda work: work.cancelled() or work.exception())  # seen, whenever that is
        work.cancel()
        await asyncio.wait({work}, timeout=GRACE_S)


def checked_reply(reply: Any, name: str) -> Reply:
    """The reply, if it keeps the protocol; `name` is the environment's. Raises `EnvironmentFailure`."""
    where = f"{name}.reply"
    if not isinstance(reply, Reply):
        raise EnvironmentFailure(f"{where} returned {described(reply)}, not a Reply: return one")
    messages = _checked_messages(reply.messages, where)
    if not reply.done and not messages and not isinstance(reply, Asked):
        raise EnvironmentFailure(f"{where} is neither done nor has messages: there is nothing the model could answer")
    if any(message.role == "assistant" for message in messages):
        raise EnvironmentFailure(f"{where} returned a message of the role 'assistant': only the model speaks as the assistant")
    if not isinstance(reply.info, Mapping):
        raise EnvironmentFailure(f"{where}: info is {described(reply.info)}, not a mapping")
    return replace(reply, info=checked_info(reply.info, where))


def checked_info(info: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What an environment or an agent says of its trajectory: JSON values and fields. Raises `EnvironmentFailure`, which names `where`."""
    plain, fields = apart(info)
    return {**_as_json(plain, f"{where}: info"), **checked(fields, where, EnvironmentFailure)}


def result_of(program: asyncio.Future[Any], name: str) -> Any:
    """What a program of the user's returned that has ended. Raises `EnvironmentFailure`, which begins with `name`, if it raised."""
    if program.cancelled():
        raise EnvironmentFailure(f"{name} awaited something that was cancelled")
    error = program.exception()
    if isinstance(error, EnvironmentFailure):  # it says itself what was wrong
        raise EnvironmentFailure(f"{name}: {error}") from error
    if error is not None:
        raise EnvironmentFailure(f"{name} raised {origin(error)}") from error
    return program.result()


def checked_generation(generation: Generation, request: GenerateRequest) -> Generation:
    """The generation, if it answers the request. Raises `EngineFailure`: its numbers would go into gradients."""
    where = f"engine answer to request {request.id}"
    arrays = {"tokens": generation.tokens_T, "log-probabilities": generation.logprobs_T, "versions": generation.versions_T}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise EngineFailure(f"{where}: arrays of different lengths: {lengths}")
    if generation.id != request.id:
        raise EngineFailure(f"{where} is for request {generation.id}")
    if lengths["tokens"] > request.sampling.max_new_tokens:
        raise EngineFailure(f"{where}: {lengths['tokens']} tokens, more than max_new_tokens {request.sampling.max_new_tokens}")
    if not lengths["tokens"] and generation.finish != "abort":
        raise EngineFailure(f"{where}: no tokens, though it finished with {generation.finish.value!r}")
    if not np.isfinite(generation.logprobs_T).all():
        raise EngineFailure(f"{where}: log-probabilities that are not finite")
    if lengths["tokens"] and int(generation.versions_T.min()) < 0:
        raise EngineFailure(f"{where}: tokens without a policy version")
    return generation


def checked_experts(generation: Generation, request: GenerateRequest, kind: RoutedExperts) -> NDArray[Any]:
    """The routes that the request asked for, in the smallest type. Raises `RoutesRefused`: the trajectory cannot be trained on others."""
    assert request.routes_from is not None
    if not len(generation.tokens_T):  # it was aborted before its first pass: whoever goes on from here gets them all
        return np.zeros((0, kind.layers, kind.chosen), expert_dtype(kind.experts))
    rows = len(request.tokens_T) + len(generation.tokens_T) - 1 - request.routes_from
    if generation.experts_RLK is None:
        raise RoutesRefused(f"the engine returned no routes with request {request.id}")
    if len(generation.experts_RLK) != rows:
        raise RoutesRefused(f"the engine returned routes of {len(generation.experts_RLK)} tokens with request {request.id}, not {rows}")
    return narrowed(generation.experts_RLK, kind)


def _checked_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if isinstance(messages, str | Message) or not isinstance(messages, Sequence):
        raise EnvironmentFailure(f"{where} returned {described(messages)}, not a sequence of Message: return one")
    for message in messages:
        if not (isinstance(message, Message) and isinstance(message.role, str) and isinstance(message.content, str)):
            raise EnvironmentFailure(f"{where} returned {described(message)} among its messages, not a Message of two texts")
        if not (is_unicode(message.role) and is_unicode(message.content)):  # JSON has halves as escapes, so a model can write one
            raise EnvironmentFailure(f"{where} returned a message with half of a surrogate pair, which no tokenizer takes")
    return tuple(messages)


def _as_json(value: Any, what: str) -> Any:
    """A copy, which user code cannot change, as it comes out of the journal.

    Raises `EnvironmentFailure` for what JSON cannot hold, or would change in silence: keys that are not text.
    """
    try:
        text = json.dumps(value, allow_nan=False)
        strange = [key for key in _keys(value) if not isinstance(key, str)]
    except (TypeError, ValueError, RecursionError, RuntimeError) as error:  # RuntimeError: it is being changed, in another thread
        raise EnvironmentFailure(f"{what} must hold JSON values: {error}") from error
    if strange:
        raise EnvironmentFailure(f"{what} must hold JSON values, and has the key {described(strange[0])}: JSON's are text")
    return json.loads(text)


def _keys(value: Any) -> Iterator[Any]:
    """Those of all mappings within a value."""
    within = value
    if isinstance(value, Mapping):
        yield from value
        within = value.values()
    elif not isinstance(value, list | tuple):
        return
    for item in within:
        yield from _keys(item)
