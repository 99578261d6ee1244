"""Rewards written for TRL and slime, unchanged."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.loop.local import local_run
from verst.config.load import load_config
from verst.errors import ExtensionError, RewardFailure
from verst.rewards import adapters
from verst.rewards.conversation import split
from verst.rewards.metrics import record, recording
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.runtime.shared_scorer import make_scorer
from verst.types import FinishReason, Group, Message, Prompt, Status, Trajectory, Turn

EXAMPLES = Path(__file__).parents[2] / "examples/rewards"
ASKED = (Message("system", "Be brief."), Message("user", "6 * 7?"))

USER = """
import asyncio

def plain(prompts, completions, **kwargs):
    return [float(len(c)) for c in completions]

def seen(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
    assert (len(prompts), answer) == (1, ["42"])
    log_extra("column", ["x"])
    log_metric("step", trainer_state.global_step)
    assert completion_ids == [[5, 6]] and prompts[0][-1] == {"role": "user", "content": "6 * 7?"}
    return [1 if completions == [[{"role": "assistant", "content": "42"}]] else 0]

def old_ids(completions_ids, **kwargs):
    return [len(ids) for ids in completions_ids]

def elsewhere(completions, **kwargs):
    return [None] * len(completions)

def unknown(completions, **kwargs):
    return [float("nan") if c == "" else float(len(c)) for c in completions]

def endless(completions, **kwargs):
    return [float("inf") if c == "" else 2.0 for c in completions]

def column(completions, solution):
    return [0.0]

def two(completions, **kwargs):
    return [1.0, 2.0]

def verst_like(trajectory, fields):
    return 0.0

def with_option(trajectory, fields, bonus=0.1, *, scale=None):
    return 0.0

def batched(args, samples):
    return [s.index + args.bonus for s in samples]

def longest(completions, **kwargs):
    return [float(len(c) == max(map(len, completions))) for c in completions]

def some(completions, answer):
    assert answer == ["4"] * len(completions)
    return [1.0 if c == "" else None for c in completions]

def short(args, samples):
    return [0, 1]

async def ranks(args, samples):
    return [{"rank": s.index, "length": len(s.response)} for s in samples]

def arrays(args, sample):
    import numpy as np
    return {"a": np.float32(0.5), "b": np.float32(0.25), "c": np.int64(3), "d": np.True_, "e": "text"}

async def one(args, sample, **kwargs):
    return {"a": sample.reward is None, "b": 2.0}

def three(args, sample, extra):
    return 0.0
"""


def said(text: str = "42", member: int = 3, status: Status = Status.FINISHED, messages: tuple[Message, ...] = ()) -> Trajectory:
    """Two prompt tokens, two generated ones of policy version 7."""
    mask, versions = np.array([0, 0, 1, 1], np.bool_), np.array([-1, -1, 7, 7], np.int32)
    tokens, logprobs = np.array([1, 2, 5, 6], np.int32), np.array([0, 0, -0.5, -0.25], np.float32)
    whole = messages or (*ASKED, Message("assistant", text))
    turns = tuple(Turn(0, 2, 4, FinishReason.STOP, m.content) for m in whole[len(ASKED) :] if m.role == "assistant")
    return Trajectory(f"4/{member}", tokens, mask, logprobs, versions, turns, whole, status, 0)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "bring_along.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(EXAMPLES), *sys.path])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("slime", "miles", "bring_along", "bring_along_too")]:
        del sys.modules[name]


def score(
    reference: str, trajectory: Trajectory | list[Trajectory], fields: dict[str, Any], **options: Any
) -> tuple[Any, dict[str, float]]:
    """What the reward gives, and what it recorded."""
    with recording() as recorded:
        value = RewardSpec(reference, options).build()(trajectory, fields)
        return (asyncio.run(value) if inspect.iscoroutine(value) else value), recorded


def test_a_trl_function_gets_what_trl_passes():
    assert score("trl:bring_along:seen", said(), {"answer": "42", "unused": 1}) == (1, {"score/step": 7})
    assert score("trl:bring_along:plain", said("four"), {}, conversational=False)[0] == 4
    assert score("trl:bring_along:old_ids", said(), {})[0] == 2


def test_the_completion_of_several_turns_begins_with_the_first_generated_message():
    shots = (Message("user", "1+1?"), Message("assistant", "2"))
    whole = (*shots, *ASKED, Message("assistant", "41"), Message("user", "no"), Message("assistant", "42"))
    turns = (Turn(0, 2, 3, FinishReason.STOP, "41"), Turn(3, 3, 4, FinishReason.STOP, "42"))
    trajectory = replace(said(), turns=turns, messages=whole)
    assert score("trl:bring_along:plain", trajectory, {})[0] == 3  # messages
    assert score("trl:bring_along:plain", trajectory, {}, conversational=False)[0] == len("41no42")


def test_answers_that_an_agent_wrote_itself_are_no_generated_ones():
    made_up = (Message("assistant", "perhaps 40"), Message("user", "no"))
    whole = (*ASKED, Message("assistant", "41"), Message("user", "no"), *made_up, Message("assistant", "42"))
    turns = (Turn(0, 2, 3, FinishReason.STOP, "41"), Turn(3, 3, 4, FinishReason.STOP, "42"))
    trajectory = replace(said(), turns=turns, messages=whole)
    assert split(trajectory) == (ASKED, whole[len(ASKED) :])
    assert score("trl:bring_along:plain", trajectory, {})[0] == 5
    # Of a demonstration a turn's text is the template's too, so it matches no message.
    shown = replace(trajectory, turns=(Turn(0, 2, 4, FinishReason.STOP, "42<|im_end|>"),), messages=(*made_up, *ASKED, whole[-1]))
    assert split(shown) == ((*made_up, *ASKED), whole[-1:])
    assert split(replace(trajectory, turns=())) == (whole, ())


def test_trl_functions_are_summed_with_weights_and_none_does_not_count():
    several = "trl:bring_along:plain+bring_along:elsewhere+bring_along:old_ids"
    value, recorded = score(several, said("four"), {}, conversational=False, weights=[1, 100, 0.5])
    assert (value, recorded) == (5, {"score/plain": 4, "score/old_ids": 2})
    with pytest.raises(RewardFailure, match="None for this prompt"):
        score("trl:bring_along:elsewhere", said(), {})
    with pytest.raises(ExtensionError, match="weights has 2 entries for 1 functions"):
        score("trl:bring_along:plain", said(), {}, weights=[1, 2])


def test_nan_is_none_where_there_are_several_trl_functions():
    """TRL makes None NaN, sums what is not, and means what is not."""
    several = "trl:bring_along:plain+bring_along:unknown"
    assert score(several, said(""), {}, conversational=False, weights=[1, 10]) == (0, {"score/plain": 0})
    with pytest.raises(RewardFailure, match="None for this prompt"):
        score("trl:bring_along:elsewhere+bring_along:unknown", said(""), {}, conversational=False)
    group = [said("four", 0), said("", 1), said("42", 2)]
    value, recorded = score(several, group, {}, conversational=False, whole_group=True)
    assert (value, recorded) == ([8, 0, 4], {"score/plain": 2, "score/unknown": 3})
    assert np.isnan(score("trl:bring_along:unknown", said(""), {}, conversational=False)[0])  # which the worker refuses


def test_what_is_infinite_fails_its_trajectory_alone():
    group = [said("four", 0), said("", 1)]
    value, recorded = score("trl:bring_along:plain+bring_along:endless", group, {}, conversational=False, whole_group=True)
    assert (value, recorded) == ([6, float("inf")], {"score/plain": 2, "score/endless": 2})  # the worker refuses the second


def test_trl_functions_of_one_name_have_metrics_apart(tmp_path: Path):
    (tmp_path / "bring_along_too.py").write_text("def plain(completions, **kwargs):\n    return [100.0]\n")
    several = "trl:bring_along:plain+bring_along_too:plain+bring_along:old_ids"
    value, recorded = score(several, said("four"), {}, conversational=False)
    assert (value, recorded) == (106, {"score/bring_along:plain": 4, "score/bring_along_too:plain": 100, "score/old_ids": 2})


def test_functions_that_compare_completions_are_called_once_for_a_group():
    group = [said("four", 0), said("1", 1), said("", 2)]
    assert score("trl:bring_along:longest", group, {}, conversational=False, whole_group=True)[0] == [1, 0, 0]
    several = "trl:bring_along:longest+bring_along:elsewhere+bring_along:some"
    value, recorded = score(several, group, {"answer": "4"}, conversational=False, whole_group=True, weights=[1, 1, 10])
    assert value == [1, 0, 10]  # `some` says nothing of the first two
    assert recorded == {"score/longest": pytest.approx(1 / 3), "score/some": 1}
    assert score("trl:bring_along:elsewhere", group, {}, whole_group=True)[0] == [None] * 3
    with pytest.raises(RewardFailure, match=r"two returned '\[1.0, 2.0\]' for 3 completion\(s\)"):
        score("trl:bring_along:two", group, {}, whole_group=True)
    with pytest.raises(RewardFailure, match=r"returned '\[0, 1\]' for 3 samples: return a list with one number for each"):
        score("slime:bring_along:short", group, {})
    value, recorded = score("slime:bring_along:ranks", group, {}, reward_key="rank")
    assert value == [0, 1, 2]
    assert recorded == {"score/length": pytest.approx(5 / 3)}


def test_what_a_trl_function_lacks_or_breaks_is_said():
    with pytest.raises(RewardFailure, match="needs the column 'solution', which the prompt does not have; it has: answer"):
        score("trl:bring_along:column", said(), {"answer": "42"})
    with pytest.raises(RewardFailure, match=r"returned '\[1.0, 2.0\]' for 1 completion\(s\)"):
        score("trl:bring_along:two", said(), {})
    with pytest.raises(ExtensionError, match=r"\(trajectory, fields\), which TRL could not call either; expected: def reward\(prompts"):
        score("trl:bring_along:verst_like", said(), {})
    with pytest.raises(ExtensionError, match="nearest: weights"):
        score("trl:bring_along:plain", said(), {}, weight=[1])


def test_slime_functions():
    assert score("slime:bring_along:batched", [said(member=3), said(member=5)], {}, bonus=0.5)[0] == [3.5, 5.5]
    assert score("slime:bring_along:one", said(), {}, reward_key="a") == (True, {"score/b": 2.0})
    assert score("slime:bring_along:arrays", said(), {}, reward_key="a") == (0.5, {"score/b": 0.25, "score/c": 3, "score/d": 1})
    with pytest.raises(RewardFailure, match="a dict with a, b: name the one to train by"):
        score("slime:bring_along:one", said(), {})
    with pytest.raises(AttributeError, match=r"args has no 'bonus': .* give it as reward\.options\.bonus"):
        score("slime:bring_along:batched", [said()], {})
    with pytest.raises(ExtensionError, match=r"missing a required argument: 'extra'.*expected: async def rm\(args, sample\)"):
        score("slime:bring_along:three", said(), {})


def test_a_sample_has_what_slime_publishes():
    from verst.rewards import slime

    caught: list[Any] = []
    slime.adapt("mine", lambda args, sample: caught.append(sample), {"label_key": "gold"})(said(), {"gold": "42", "metadata": {"k": 1}})
    sample = caught[0]
    assert (sample.group_index, sample.index, sample.response, sample.response_length, sample.label) == (4, 3, "42", 2, "42")
    assert (sample.tokens, sample.loss_mask, sample.rollout_log_probs) == ([1, 2, 5, 6], [1, 1], [-0.5, -0.25])
    assert (sample.metadata, sample.weight_versions, sample.status.value) == ({"k": 1}, ["7"], "completed")
    assert sample.prompt == [{"role": m.role, "content": m.content} for m in ASKED]  # no model is known outside of a run


async def test_a_reward_of_slime_gets_the_runs_tokenizer(tiny: Path):
    """`prompt` is text, as published functions have it, of the very tokens that the policy was given."""
    (Path.cwd() / "of_text.py").write_text("def rm(args, sample):\n    return len(sample.prompt + sample.response)\n")
    text = AutoTokenizer.from_pretrained(tiny).decode([1, 2], clean_up_tokenization_spaces=False)
    config = load_config({"run": {"steps": 1}, "model": {"path": str(tiny)}, "reward": {"function": "slime:of_text:rm"}})
    scorer = make_scorer(config, None, Path.cwd() / "rewards.log")
    await scorer.start()
    try:
        scored = await scorer.score(Group(4, Prompt("p:0", ASKED), (said("42"),), 7))
    finally:
        scorer.close()
    assert (scored.trajectories[0].error, scored.trajectories[0].reward) == (None, len(text) + 2)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("trl:bring_along:verst_like", "expected: def reward"),
        ("trl:bring_along:with_option", r"is \(trajectory, fields, bonus=0\.1, \*, scale=None\), which TRL could not call either"),
        ("slime:bring_along:three", "expected: async def rm"),
        ("trl:bring_along:plane", r"module bring_along \(.*bring_along\.py\) has no 'plane'; nearest: plain"),
    ],
)
def test_a_signature_is_read_without_an_import(reference: str, message: str):
    framework, _, function = reference.partition(":")
    with pytest.raises(ExtensionError, match=message):
        adapters.check_on_paper(framework, function)
    assert "bring_along" not in sys.modules
    for fits in ("seen", "plain", "old_ids"):
        adapters.check_on_paper("trl", f"bring_along:{fits}")
    adapters.check_on_paper("slime", "bring_along:batched")


def test_a_module_may_be_called_trl():
    assert adapters.parts("trl:reward") is None
    assert adapters.parts("exact_match") is None
    assert adapters.parts("trl:a:b+c.d:e") == ("trl", ["a:b", "c.d:e"])


async def test_the_examples_score_in_their_processes():
    """Everything at once: user modules, async, metrics, failures, in worker processes as in a run."""
    expected = {
        ("own:score", (("close", 0.2),)): ([1, 0.2, 0], {"score/has_number": 1}),
        ("trl:from_trl:correct+from_trl:brief", ()): ([1, 0, 0], {"score/correct": 1, "score/brief": 0, "score/tokens": 2}),
        ("group:shortest_right", (("bonus", 0.25),)): ([1.25, 0, 0], {"score/right": pytest.approx(1 / 3)}),
        ("slime:from_slime:rm", (("reward_key", "score"), ("penalty", 0.5))): ([1, 0, -0.5], {"score/correct": 1, "score/tokens": 2}),
    }
    cut = said("no idea", 2, Status.TRUNCATED)
    group = Group(4, Prompt("p:0", ASKED, {"answer": "42"}), (said("42", 0), said("41", 1), cut), 7)
    for (reference, options), (rewards, recorded) in expected.items():
        scorer = Scorer(RewardSpec(reference, dict(options)), workers=1, deadline_s=20)
        await scorer.start()
        try:
            scored = await scorer.score(group)
        finally:
            scorer.close()
        assert [t.error for t in scored.trajectories] == [None] * 3
        assert [t.reward for t in scored.trajectories] == rewards, reference
        assert scored.trajectories[0].info == recorded


def test_what_is_recorded_is_summed_and_finite():
    record("outside", 1)
    with recording() as recorded:
        record("n", 1)
        record("n", 2)
        with pytest.raises(RewardFailure, match="records nan as metric 'n'"):
            record("n", float("nan"))
    assert recorded == {"score/n": 3}


def test_examples_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.iterdir() if path.is_file()}
    assert len(lengths) >= 5
    assert max(lengths.values()) <= 30


async def test_a_run_trains_on_them_and_reports_what_they_record(tmp_path: Path, tiny: Path, prompts: Path):
    reward = {"function": "trl:from_trl:correct+from_trl:brief", "options": {"weights": [1, 0.1]}}
    values = {"run": {"steps": 2, "name": "brought", "dir": str(tmp_path)}, "data": {"path": str(prompts)}, "reward": reward}
    run = await local_run(tmp_path, tiny, values).go()
    assert run.metric("rollout/failed") == [0, 0]
    assert run.metric("score/brief") == [0, 0]
    tokens, generated = run.metric("score/tokens"), run.metric("rollout/generated_tokens")
    assert tokens == pytest.approx(generated)
    assert len(tokens) == 2
