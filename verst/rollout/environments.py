"""The environments shipped with Verst, and how a run finds its own.

A conversation of one turn takes the same path as one of many: its environment ends it at the first reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from verst import extend, slime_api
from verst.errors import ExtensionError
from verst.protocols import Environment
from verst.rollout.agent import Agents
from verst.rollout.guessing import Guessing
from verst.rollout.python_tool import PythonTool
from verst.rollout.rollouts import Rollouts
from verst.rollout.slime import SlimeRollouts
from verst.rollout.verifiers_agent import Verifiers
from verst.types import Completion, Message, Prompt, Reply


class SingleTurn:
    """The prompt's messages, one completion, the end."""

    turns = 1

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        return prompt.messages

    async def reply(self, completion: Completion) -> Reply:
        return Reply()


class SecondTry:
    """Tells the model that its answer was wrong and lets it try again.

    An answer counts as right if the last line of the completion, without surrounding space and a final full stop, ends with the prompt's
    answer as a word of its own. That decides only whether to go on: the reward judges the trajectory, and finds `tries` and `solved` in
    its `info`.

    Args:
        tries: completions a trajectory may have (`rollout.max_turns` must allow as many).
        field: the prompt's field that holds the right answer; `start` raises `KeyError` for a prompt without it.
        message: what the user says after a wrong answer.
    """

    def __init__(self, tries: int = 2, field: str = "answer", message: str = "That is not correct. Try again.") -> None:
        if tries < 1:
            raise ValueError(f"tries is {tries}; a trajectory needs at least one")
        self._left = self.turns = tries
        self._field = field
        self._message = Message("user", message)
        self._answer = ""

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        self._answer = str(prompt.fields[self._field]).strip()
        return prompt.messages

    async def reply(self, completion: Completion) -> Reply:
        self._left -= 1
        solved = _ends_with(completion.text, self._answer)
        info = {"tries": self.turns - self._left, "solved": solved}
        if solved or not self._left:
            return Reply(info=info)
        return Reply(messages=(self._message,), done=False, info=info)


Made = Callable[[], Environment] | Agents | Rollouts
"""What makes the environment of each trajectory, or what asks for completions itself."""

BY_PREFIX: Mapping[str, Callable[..., Made]] = {"agent": Agents, "rollout": Rollouts, "slime": SlimeRollouts}
"""Before a reference and a colon: what it names asks for completions itself, in messages, in tokens, or as slime's functions do."""

VERIFIERS = "verifiers:"
"""Before a name or a loader: an environment of the library verifiers (`verst.rollout.verifiers_agent`)."""

SHIPPED: Mapping[str, Callable[..., Environment]] = {
    "single_turn": SingleTurn,
    "second_try": SecondTry,
    "guessing": Guessing,
    "python_tool": PythonTool,
}
"""Each has `turns`, the completions that its trajectory may have."""


def environment_factory(reference: Any, options: Mapping[str, Any]) -> Made:
    """What makes a fresh environment for each trajectory: a shipped name, `module:Class`, or a class or function given from Python.

    With a prefix of `BY_PREFIX`, a function that asks for completions itself; with `VERIFIERS`, an environment of that library.

    Raises `ExtensionError` if it cannot be found, lacks a method, or does not take `options`.
    """
    if isinstance(reference, str) and reference.startswith(VERIFIERS):
        return Agents(Verifiers(reference.removeprefix(VERIFIERS), options))
    if (asking := of_prefix(reference)) is not None:
        kind, name = asking
        if kind == "slime":
            slime_api.make_importable()
        return BY_PREFIX[kind](extend.load(name, shipped={}, kind=kind), **options)
    found = extend.load(reference, shipped=SHIPPED, kind="environment")
    if isinstance(found, Agents | Rollouts):
        if options:
            raise ExtensionError(f"rollout.environment_options: {found.title} has its options already: give them where it is made")
        return found
    extend.check_class(found, "environment", Environment, options)
    return partial(found, **options)


def of_prefix(reference: Any) -> tuple[str, str] | None:
    """The prefix of a reference to a function that asks for completions, and the reference; None for any other."""
    kind, _, name = reference.partition(":") if isinstance(reference, str) else ("", "", "")
    return (kind, name) if kind == "agent" or (kind in BY_PREFIX and ":" in name) else None  # a module may be called rollout


def check_machine(make: Made) -> None:
    """Raises `ExtensionError` if this machine lacks what the environment needs. A class says so in a `check_machine` of its own."""
    if isinstance(make, Agents):
        make.check_machine()
    if isinstance(make, partial):
        getattr(make.func, "check_machine", lambda **_: None)(**make.keywords)


def _ends_with(text: str, answer: str) -> bool:
    """Whether the last line ends with this answer, and not merely with its last characters ("142" does not answer "42")."""
    lines = text.strip().splitlines()
    line = lines[-1].strip().removesuffix(".") if lines else ""
    before = line[: len(line) - len(answer)]
    return bool(answer) and line.casefold().endswith(answer.casefold()) and not (before and (before[-1].isalnum() or before[-1] in "-.,"))
