import json
from dataclasses import replace

import numpy as np
import pytest

from verst.data.tasks import TaskSource
from verst.errors import ExtensionError, RewardFailure
from verst.rewards.shipped import ExactMatch, FromInfo, MathVerify, ReasoningGym, Regex, from_exact_json
from verst.rewards.spec import RewardSpec
from verst.types import FinishReason, Status, Trajectory, Turn


def said(text: str) -> Trajectory:
    """A trajectory whose last turn said `text`."""
    arrays = np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32)
    return Trajectory("0/0", *arrays, (Turn(0, 0, 1, FinishReason.STOP, text),), (), Status.FINISHED, 0)


@pytest.mark.parametrize(
    ("options", "text", "answer", "reward"),
    [
        ({}, " 42\n", "42", 1),
        ({}, "42.", "42", 0),
        ({}, "42", 42, 1),
        ({}, "Yes", "yes", 0),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
        ({"strip": False}, "42 ", "42", 0),
    ],
)
def test_exact_match(options, text, answer, reward):
    assert ExactMatch(**options)(said(text), {"answer": answer}) == reward


def test_a_missing_answer_is_a_failure_and_not_a_zero():
    with pytest.raises(RewardFailure, match="no field 'gold'; its fields: answer"):
        ExactMatch(field="gold")(said("1"), {"answer": "1"})
    with pytest.raises(RewardFailure, match="field 'answer' is list"):
        ExactMatch()(said("1"), {"answer": ["1"]})


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({"pattern": r"\d+"}, "it is 7", 1),
        ({"pattern": r"\d+"}, "seven", 0),
        ({"pattern": r"<think>.*</think>\d+", "whole": True}, "<think>a\nb</think>7", 1),
        ({"pattern": r"<think>.*</think>\d+", "whole": True}, "<think>a\nb</think>7!", 0),
        ({"pattern": r"= (\d+)", "group": 1}, "1+1 = 2, so = 7", 1),
        ({"pattern": r"= (?P<n>\d+)", "group": "n"}, "= 7, no: = 8", 0),
        ({"pattern": r"x|(\d+)", "group": 1}, "x", 0),
    ],
)
def test_regex(options, text, reward):
    assert Regex(**options)(said(text), {"answer": "7"}) == reward


def test_regex_options_are_checked():
    with pytest.raises(ExtensionError, match=r"pattern '\(' is not a regular expression"):
        Regex("(")
    with pytest.raises(ExtensionError, match=r"group 2 is not a group of '\(a\)'; its groups: \[0, 1\]"):
        Regex("(a)", group=2)


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("42", "The answer is $42$.", 1),
        ("1/2", r"so \boxed{\frac{2}{4}}", 1),
        (r"\frac{1}{2}", "it is 0.5", 1),
        (r"$\sqrt{8}$", r"\boxed{2\sqrt{2}}", 1),
        ("(1,2)", r"\boxed{(1, 2)}", 1),
        ("42", r"\boxed{41}", 0),
        ("42", "no idea", 0),
    ],
)
def test_math_verify(answer, text, reward):
    assert MathVerify()(said(text), {"answer": answer}) == reward


def test_math_verify_says_when_it_could_not_tell():
    with pytest.raises(RewardFailure, match="finds no expression in field 'answer'"):
        MathVerify()(said("1"), {"answer": "$ $"})
    with pytest.raises(RewardFailure, match="math-verify exceeded 1 s"):
        MathVerify(timeout_s=1)(said(r"\boxed{9^{9^{9^{9}}}}"), {"answer": r"\frac{1}{2}"})


@pytest.mark.parametrize("task", ["chain_sum", "arc_1d", "rearc", "countdown"])
def test_reasoning_gym_scores_the_right_answer_after_json(task):
    fields = json.loads(json.dumps(TaskSource(task, {}).read_block(3)[7].load()))
    assert ReasoningGym()(said(f" {fields['answer']}\n"), fields) == 1.0
    assert ReasoningGym()(said("nonsense"), fields) < 0.5


def test_reasoning_gym_scorers_that_look_up_numbers_find_them():
    fields = json.loads(json.dumps(TaskSource("graph_color", {}).read_block(3)[7].load()))
    coloring = from_exact_json(fields["entry"])["metadata"]["possible_answer"]
    assert all(type(vertex) is int for vertex in coloring)
    assert ReasoningGym()(said(json.dumps(coloring)), fields) == 1.0


def test_reasoning_gym_takes_the_answer_out_of_the_text():
    fields = dict(TaskSource("chain_sum", {}).read_block(0)[0].load())
    right = fields["answer"]
    tagged = ReasoningGym(tag="answer")
    assert tagged(said(f"<answer>0</answer> no, <answer>\n{right} </answer>"), fields) == 1.0
    assert tagged(said(right), fields) == 0.0
    assert ReasoningGym(pattern=r"is (-?\d+)")(said(f"It is {right}!"), fields) == 1.0
    with pytest.raises(RewardFailure, match=r"not of a reasoning-gym task; set data.task"):
        tagged(said("1"), {"answer": "1"})
    with pytest.raises(ExtensionError, match="both given"):
        ReasoningGym(pattern="a", tag="b")


class Bonus:
    def __init__(self, amount=1.0):
        self.amount = amount

    def __call__(self, trajectory, fields):
        return self.amount


def constant(trajectory, fields, *, value):
    return value


def test_options_reach_classes_and_functions():
    assert RewardSpec(f"{__name__}:Bonus", {"amount": 3}).build()(said(""), {}) == 3
    assert RewardSpec(f"{__name__}:constant", {"value": 2}).build()(said(""), {}) == 2
    with pytest.raises(ExtensionError, match=r"cannot be called as Bonus\(amout=3\).*nearest: amount"):
        RewardSpec(f"{__name__}:Bonus", {"amout": 3}).build()
    with pytest.raises(ExtensionError, match="missing a required argument: 'value'"):
        RewardSpec(f"{__name__}:constant").build()
    with pytest.raises(ExtensionError, match="nearest: exact_match"):
        RewardSpec("exact_macth").build()


def test_from_info_adds_up_what_the_environment_reported():
    score = FromInfo({"solved": 1, "guesses": -0.125})
    assert score(replace(said(""), info={"solved": True, "guesses": 3}), {}) == 0.625
    assert score(replace(said(""), info={"solved": False, "guesses": 0}), {}) == 0
    with pytest.raises(RewardFailure, match="reported no 'guesses'; it reported: solved"):
        score(replace(said(""), info={"solved": True}), {})
    with pytest.raises(RewardFailure, match="reported 'solved' as 'yes'; it must be a number"):
        score(replace(said(""), info={"solved": "yes", "guesses": 3}), {})
    for weights, message in (({}, "weights is {}"), (["solved"], "such as {solved: 1}"), ({"solved": "1"}, "weight of 'solved' is '1'")):
        with pytest.raises(ExtensionError, match=message):
            FromInfo(weights)  # pyright: ignore[reportArgumentType]
