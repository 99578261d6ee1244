"""The shipped environments and how a run finds one."""

from __future__ import annotations

from typing import Any

import pytest

from verst.errors import ExtensionError
from verst.rollout.environments import SecondTry, SingleTurn, environment_factory
from verst.rollout.guessing import Guessing
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
    make: Any = environment_factory("second_try", {"tries": 5})
    assert isinstance(make(), SecondTry)
    assert make() is not make()
    for reference in ("verst.rollout.environments:SingleTurn", SingleTurn):
        make = environment_factory(reference, {})
        assert isinstance(make(), SingleTurn)


@pytest.mark.parametrize(
    ("reference", "options", "expected"),
    [
        ("second_tri", {}, "nearest: second_try"),
        ("second_try", {"trys": 3}, "unexpected keyword argument 'trys'; nearest: tries"),
        ("verst.types:Prompt", {"id": "", "messages": ()}, "has no method 'start'"),
        (SingleTurn(), {}, "give the class"),
        (
            lambda prompt: prompt,
            {},
            r"Expected: a class with async def start\(self, .*\) -> .*, async def reply\(self, .*\) -> 'Reply', or a ",
        ),
    ],
)
def test_factory_refuses_what_cannot_serve(reference, options, expected):
    with pytest.raises(ExtensionError, match=expected):
        environment_factory(reference, options)


def test_second_try_needs_a_try():
    with pytest.raises(ValueError, match="tries is 0"):
        SecondTry(tries=0)


async def test_guessing_answers_higher_and_lower_until_the_number_is_found():
    game = Guessing(low=1, high=10, max_guesses=5)
    (opening,) = await game.start(Prompt("p:0", (Message("user", "Let us play."),), {"number": 7}))
    assert opening.content.startswith("Let us play.\nI have thought of a whole number from 1 to 10. Guess it in at most 5 tries")
    assert await game.reply(said("I say 5")) == Reply((Message("user", "higher"),), False, {"guesses": 1, "solved": False})
    assert await game.reply(said("not 7 but 9.")) == Reply((Message("user", "lower"),), False, {"guesses": 2, "solved": False})
    lost = await game.reply(said("hm"))
    assert lost.messages[0].content == "I found no number in that. Guess a whole number from 1 to 10."
    assert lost.info == {"guesses": 2, "solved": False}
    assert await game.reply(said("7")) == Reply(info={"guesses": 3, "solved": True})


async def test_guessing_ends_when_the_guesses_are_used_up():
    game = Guessing(max_guesses=2)
    await game.start(Prompt("p:0", (Message("user", "Go."),), {"number": "7"}))
    assert not (await game.reply(said("9" * 5000))).done  # more digits than Python reads: no number
    assert await game.reply(said("-3")) == Reply(info={"guesses": 1, "solved": False})


async def test_guessing_without_data_takes_the_number_from_the_prompt():
    async def number_of(name: str) -> int:
        for guess in range(1, 6):
            game = Guessing(1, 5)
            await game.start(Prompt(name, (Message("user", "Go."),)))
            if (await game.reply(said(str(guess)))).info["solved"]:
                return guess
        raise AssertionError("no number from 1 to 5")

    numbers = [await number_of(f"p:{n}") for n in range(12)]
    assert numbers == [await number_of(f"p:{n}") for n in range(12)]
    assert len({*numbers}) > 2


@pytest.mark.parametrize("number", [0, 11, "x", 7.5, True, float("inf"), [7], ""])
async def test_guessing_wants_a_number_within_its_range(number):
    with pytest.raises(ValueError, match="not a whole number from 1 to 10"):
        await Guessing(1, 10).start(Prompt("p:0", (Message("user", "Go."),), {"number": number}))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"low": 2, "high": 1}, "low is 2"), ({"max_guesses": 0}, "max_guesses is 0"), ({"high": 9.5}, "high is 9.5, not a whole number")],
)
def test_guessing_refuses_options_that_make_no_game(options, message):
    with pytest.raises(ValueError, match=message):
        Guessing(**options)
