"""The shipped environments and how a run finds one."""

from __future__ import annotations

import pytest

from verst.errors import ExtensionError
from verst.rollout.environments import SecondTry, SingleTurn, environment_factory
from verst.types import Completion, FinishReason, Message, Prompt, Reply

PROMPT = Prompt("p:0", (Message("user", "6 x 7?"),), {"answer": "42"})


def said(text: str) -> Completion:
    return Completion(text, (1,), FinishReason.STOP)


async def test_single_turn_ends_at_the_first_reply():
    environment = SingleTurn()
    assert await environment.start(PROMPT) == PROMPT.messages
    assert await environment.reply(said("anything")) == Reply()


async def test_second_try_goes_on_until_right_or_out_of_tries():
    environment = SecondTry(tries=3, message="No.")
    assert await environment.start(PROMPT) == PROMPT.messages
    wrong = await environment.reply(said("41"))
    assert wrong == Reply((Message("user", "No."),), done=False, info={"tries": 1, "solved": False})
    assert await environment.reply(said("It is 42.")) == Reply(info={"tries": 2, "solved": True})

    exhausted = SecondTry(tries=2)
    await exhausted.start(PROMPT)
    await exhausted.reply(said("41"))
    assert await exhausted.reply(said("43")) == Reply(info={"tries": 2, "solved": False})


@pytest.mark.parametrize(
    ("text", "solved"),
    [
        ("42", True),
        ("Let me see: 6 x 7\n\nThe answer is 42. \n", True),
        ("142", False),
        ("-42", False),
        ("3.42", False),
        ("42 or so", False),
        ("42\nno, 43", False),
        ("", False),
    ],
)
async def test_second_try_wants_the_answer_as_the_last_word(text, solved):
    environment = SecondTry()
    await environment.start(PROMPT)
    assert (await environment.reply(said(text))).info["solved"] is solved


def test_factory_binds_options_and_makes_a_fresh_one_each_time():
    make = environment_factory("second_try", {"tries": 5})
    assert isinstance(make(), SecondTry)
    assert make() is not make()
    assert isinstance(environment_factory("verst.rollout.environments:SingleTurn", {})(), SingleTurn)
    assert isinstance(environment_factory(SingleTurn, {})(), SingleTurn)


@pytest.mark.parametrize(
    ("reference", "options", "expected"),
    [
        ("second_tri", {}, "nearest: second_try"),
        ("second_try", {"trys": 3}, "unexpected keyword argument 'trys'; nearest: tries"),
        ("verst.types:Prompt", {"id": "", "messages": ()}, "has no method 'start'"),
        (SingleTurn(), {}, "give the class"),
    ],
)
def test_factory_refuses_what_cannot_serve(reference, options, expected):
    with pytest.raises(ExtensionError, match=expected):
        environment_factory(reference, options)


def test_second_try_needs_a_try():
    with pytest.raises(ValueError, match="tries is 0"):
        SecondTry(tries=0)
