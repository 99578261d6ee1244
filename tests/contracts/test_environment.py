"""What every environment must keep, run on the shipped ones; `verst.testing.check_environment` runs it on anyone's."""

from __future__ import annotations

import asyncio
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from verst.errors import EnvironmentFailure
from verst.rollout import contract
from verst.rollout.environments import SHIPPED
from verst.testing import FakeEnvironment, check_environment
from verst.types import FinishReason, Message, Prompt, Reply

PROMPT = Prompt("p:0", (Message("system", "Be brief."), Message("user", "6 x 7?")), {"answer": "42"})
OPTIONS = {"guessing": {"low": 42, "high": 42, "max_guesses": 3}, "python_tool": {"timeout_s": 20, "allow_unisolated": True}}
MORE = Reply((Message("user", "more"),), done=False)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("texts", [["42"], ["41", "42"], ["", "\n", "x"], ["```python\nprint(1)\n```", "42"]])
async def test_shipped_environments_keep_the_contract(name, texts):
    replies = await check_environment(partial(SHIPPED[name], **OPTIONS.get(name, {})), [PROMPT], texts)
    assert replies[-1][-1].done


DEEP: list[Any] = []
for _ in range(10_000):
    DEEP = [DEEP]

BREACHES = {
    "start gives text": (lambda: FakeEnvironment(opening="Hello"), "start returned 'Hello' of type str, not a sequence of Message"),
    "start gives nothing": (lambda: FakeEnvironment(opening=()), "start returned no messages"),
    "start gives dicts": (lambda: FakeEnvironment(opening=[{"role": "user"}]), "of type dict among its messages"),
    "start raises": (lambda: FakeEnvironment(opening=KeyError("answer")), r"start raised KeyError: 'answer' \(.*testing.py:\d+"),
    "start raises half a character": (lambda: FakeEnvironment(opening=ValueError("\ud83d")), r"start raised ValueError: \\ud83d \("),
    "reply is None": (lambda: FakeEnvironment([None]), "reply returned None of type NoneType, not a Reply"),
    "not done, no messages": (lambda: FakeEnvironment([Reply(done=False)]), "neither done nor has messages"),
    "speaks as assistant": (lambda: FakeEnvironment([Reply((Message("assistant", "I"),), done=False)]), "only the model speaks"),
    "message is not text": (lambda: FakeEnvironment([Reply((Message("user", 3),), done=False)]), "not a Message of two texts"),  # pyright: ignore
    "info is not JSON": (lambda: FakeEnvironment([Reply(info={"a": object()})]), "info must hold JSON values"),
    "info holds NaN": (lambda: FakeEnvironment([Reply(info={"a": float("nan")})]), "info must hold JSON values"),
    "info has other keys": (lambda: FakeEnvironment([Reply(info={"a": [{1: "b", "c": 2}]})]), "has the key 1 of type int: JSON's are text"),
    "info has no bottom": (lambda: FakeEnvironment([Reply(info={"a": DEEP})]), "info must hold JSON values: maximum recursion depth"),
    "text no tokenizer takes": (lambda: FakeEnvironment([Reply((Message("user", "\ud83d"),), done=False)]), "half of a surrogate pair"),
    "nor at the start": (lambda: FakeEnvironment(opening=[Message("user\udc80", "")]), "start returned .* half of a surrogate pair"),
    "info is a list": (lambda: FakeEnvironment([Reply(info=[1])]), "info is .* not a mapping"),  # pyright: ignore
    "second reply raises": (lambda: FakeEnvironment([MORE, OSError("gone")]), "reply in turn 2 raised OSError: gone"),
    "constructor raises": (lambda: FakeEnvironment(3), "start raised TypeError"),  # pyright: ignore
}


@pytest.mark.parametrize("name", BREACHES)
async def test_every_breach_is_found_and_described(name):
    make, expected = BREACHES[name]
    with pytest.raises(EnvironmentFailure, match=expected):
        await check_environment(make, [PROMPT], ["a", "b", "c"])


async def test_synchronous_methods_are_found():
    class Synchronous:
        def start(self, prompt):
            return prompt.messages

        def reply(self, completion):
            return Reply()

    with pytest.raises(EnvironmentFailure, match="start raised TypeError"):
        await check_environment(Synchronous, [PROMPT], ["a"])  # pyright: ignore[reportArgumentType]


async def test_instances_that_share_state_are_found():
    class Shared:
        replies = 0

        async def start(self, prompt):
            return prompt.messages

        async def reply(self, completion):
            Shared.replies += 1
            return Reply(info={"number": Shared.replies})

    with pytest.raises(AssertionError, match="answered 'a' differently in turn 1"):
        await check_environment(Shared, [PROMPT], ["a"])


class Careless:
    """Keeps the contract but for one thing, which `breach` names."""

    def __init__(self, breach):
        self._breach = breach

    async def start(self, prompt):
        return prompt.messages

    async def reply(self, completion):
        if self._breach == "truncated" and completion.finish is FinishReason.LENGTH:
            raise IndexError("nothing said")
        if self._breach == "cancelled":
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                await asyncio.sleep(1)
        self._replied = True
        return MORE if self._breach == "endless" else Reply()

    async def close(self):
        if self._breach == "unanswered" and not self._replied:
            raise AssertionError


@pytest.mark.parametrize(
    ("breach", "expected"),
    [
        ("truncated", r"IndexError: nothing said .*Expected a reply to 'right', which was cut by its limit of tokens"),
        ("cancelled", r"expected Careless\.reply to end when it is cancelled, but it went on for 0\.2 s: let asyncio\.CancelledError pass"),
        ("endless", r"expected one of the 1 texts to end the conversation about p:0, .* or ends=False if only rollout\.max_turns does"),
        ("unanswered", r"close raised AttributeError: 'Careless' object has no attribute '_replied'"),
    ],
)
async def test_what_goes_wrong_late_or_early_is_found(breach, expected, monkeypatch):
    monkeypatch.setattr(contract, "_LAST_S", 0.2)
    with pytest.raises((AssertionError, EnvironmentFailure), match=expected):
        await check_environment(partial(Careless, breach), [PROMPT], ["right wrong"])
    if breach == "endless":
        assert await check_environment(partial(Careless, breach), [PROMPT], ["right wrong"], ends=False) == [[MORE]]
    if breach == "cancelled":
        await asyncio.sleep(1)  # until what did not end has ended


async def test_prompts_and_texts_are_asked_for():
    for prompts, texts, expected in (([], ["a"], "at least one prompt"), ([PROMPT], [], "at least one text")):
        with pytest.raises(AssertionError, match=f"expected {expected}"):
            await check_environment(FakeEnvironment, prompts, texts)


async def test_the_example_keeps_the_contract():
    file = Path(__file__).parents[2] / "examples/environments/own.py"
    assert len(file.read_text().splitlines()) <= 30
    spec = importlib.util.spec_from_file_location("own_environment", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompts = [Prompt("p:0", (Message("system", "Add."),), {"numbers": [3, 4]}), Prompt("p:1", (), {"numbers": [7]})]
    solved, wrong = await check_environment(module.RunningTotal, prompts, ["3", "It is 7"])
    assert solved == [
        Reply((Message("user", "Add 4. What is the total?"),), done=False, info={"right": 1, "solved": False}),
        Reply(info={"right": 2, "solved": True}),
    ]
    assert wrong == [Reply(info={"right": 0, "solved": False})]
