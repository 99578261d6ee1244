"""What every environment must keep, run on the shipped ones; `verst.testing.check_environment` runs it on anyone's."""

from __future__ import annotations

import pytest

from verst.errors import EnvironmentFailure
from verst.rollout.environments import SHIPPED, environment_factory
from verst.testing import FakeEnvironment, check_environment
from verst.types import Message, Prompt, Reply

PROMPT = Prompt("p:0", (Message("system", "Be brief."), Message("user", "6 x 7?")), {"answer": "42"})
OPTIONS = {"guessing": {"low": 42, "high": 42, "max_guesses": 3}}
MORE = Reply((Message("user", "more"),), done=False)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("texts", [["42"], ["41", "42"], ["", "\n", "x"]])
async def test_shipped_environments_keep_the_contract(name, texts):
    replies = await check_environment(environment_factory(name, OPTIONS.get(name, {})), PROMPT, texts)
    assert replies[-1].done


BREACHES = {
    "start gives text": (lambda: FakeEnvironment(opening="Hello"), "start returned 'Hello' of type str, not a sequence of Message"),
    "start gives nothing": (lambda: FakeEnvironment(opening=()), "start returned no messages"),
    "start gives dicts": (lambda: FakeEnvironment(opening=[{"role": "user"}]), "of type dict among its messages"),
    "start raises": (lambda: FakeEnvironment(opening=KeyError("answer")), r"start raised KeyError: 'answer' \(.*testing.py:\d+"),
    "reply is None": (lambda: FakeEnvironment([None]), "reply returned None of type NoneType, not a Reply"),
    "not done, no messages": (lambda: FakeEnvironment([Reply(done=False)]), "neither done nor has messages"),
    "speaks as assistant": (lambda: FakeEnvironment([Reply((Message("assistant", "I"),), done=False)]), "only the model speaks"),
    "message is not text": (lambda: FakeEnvironment([Reply((Message("user", 3),), done=False)]), "not a Message of two texts"),  # pyright: ignore
    "info is not JSON": (lambda: FakeEnvironment([Reply(info={"a": object()})]), "info must hold JSON values"),
    "info holds NaN": (lambda: FakeEnvironment([Reply(info={"a": float("nan")})]), "info must hold JSON values"),
    "info is a list": (lambda: FakeEnvironment([Reply(info=[1])]), "info is .* not a mapping"),  # pyright: ignore
    "second reply raises": (lambda: FakeEnvironment([MORE, OSError("gone")]), "reply in turn 2 raised OSError: gone"),
    "constructor raises": (lambda: FakeEnvironment(3), "start raised TypeError"),  # pyright: ignore
}


@pytest.mark.parametrize("name", BREACHES)
async def test_every_breach_is_found_and_described(name):
    make, expected = BREACHES[name]
    with pytest.raises(EnvironmentFailure, match=expected):
        await check_environment(make, PROMPT, ["a", "b", "c"])


async def test_synchronous_methods_are_found():
    class Synchronous:
        def start(self, prompt):
            return prompt.messages

        def reply(self, completion):
            return Reply()

    with pytest.raises(EnvironmentFailure, match="start raised TypeError"):
        await check_environment(Synchronous, PROMPT, ["a"])  # pyright: ignore[reportArgumentType]


async def test_instances_that_share_state_are_found():
    class Shared:
        replies = 0

        async def start(self, prompt):
            return prompt.messages

        async def reply(self, completion):
            Shared.replies += 1
            return Reply(info={"number": Shared.replies})

    with pytest.raises(AssertionError, match="answered 'a' differently in turn 1"):
        await check_environment(Shared, PROMPT, ["a"])
