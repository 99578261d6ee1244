"""`verst eval`: what is sampled, scored and counted, and how a target is found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.loop.fakes import group
from tests.loop.local import LocalRun
from verst import cli
from verst.algorithms.estimates import wilson
from verst.config.load import load_config
from verst.errors import ConfigError
from verst.runtime.evaluation import EvalSampling, EvalSet, _result
from verst.runtime.targets import measured_targets

pytestmark = pytest.mark.usefixtures("_one_thread")


def test_what_is_counted_by_hand():
    """Four prompts of two samples: both right, one right, none, and one whose second sample could not be scored."""
    rewards = [(1.0, 1.0), (1.0, 0.0), (0.5, 0.0), (1.0, None)]
    sampling = EvalSampling(prompts=4, samples=2, ks=[1, 2])
    found = _result("m", "s", [group(i, 0, r) for i, r in enumerate(rewards)], sampling, [1, 2])
    one, two = found.pass_at[1], found.pass_at[2]
    assert one is not None
    assert two is not None
    assert (one.value, one.prompts) == ((1 + 0.5 + 0 + 1) / 4, 4)
    assert (two.value, two.prompts) == ((1 + 1 + 0) / 3, 3)  # the fourth has one scored sample only
    assert (two.low, two.high) == pytest.approx(wilson(2 / 3, 3))
    assert found.reward is not None
    assert found.reward.value == (1 + 0.5 + 0.25 + 1) / 4
    assert (found.failed, found.truncated, found.generated_tokens) == (1 / 8, 0, 1)
    assert found.rows[3].errors == ("the reward raised",)
    lenient = _result("m", "s", [group(0, 0, (0.5, 0.0))], EvalSampling(samples=2, correct_from=0.5), [1, 2])
    assert [e and e.value for e in lenient.pass_at.values()] == [0.5, 1.0]


def test_nothing_scored_is_unknown_not_zero():
    found = _result("m", "s", [group(0, 0, (None, None))], EvalSampling(samples=2), [1])
    assert (found.pass_at[1], found.reward, found.failed) == (None, None, 1)
    lonely = _result("m", "s", [group(0, 0, (1.0, 1.0))], EvalSampling(samples=2), [1]).described()
    assert json.loads(json.dumps(lonely, allow_nan=False))["reward"] == {"value": 1.0, "low": None, "high": None, "prompts": 1}


def test_sampling_that_contradicts_itself():
    assert EvalSampling(samples=8).all_ks == [1, 2, 4, 8]
    assert EvalSampling(samples=6).all_ks == [1, 2, 4, 6]
    for wrong, message in (
        (EvalSampling(samples=4, ks=[1, 8]), r"--k 1,8: pass@k needs k from 1 to --samples \(4\)"),
        (EvalSampling(samples=4, temperature=0), "greedy: the 4 samples of a prompt would be the same"),
        (EvalSampling(samples=0), "both must be 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            _ = wrong.all_ks


def test_a_run_is_measured_on_its_held_out_prompts(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Greedily, with the run's own reward given from Python: what the run itself measured after its last step."""
    out = tmp_path / "eval.json"
    words = [str(done_run.run.root), "--samples", "1", "--temperature", "0", "--prompts", "4", "--out", str(out)]
    assert cli.main(["eval", *words]) == 0
    (found,) = json.loads(out.read_text())
    assert found["name"] == "held-out"
    assert found["reward"]["value"] == pytest.approx(done_run.metric("eval/reward")[-1])
    assert [len(row["rewards"]) for row in found["rows"]] == [1] * 4
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:3] == ["model", "set", "prompts"]
    assert said[1].split()[:5] == [str(done_run.run.root), "held-out", "4", "x", "1"]
    assert said[2] == f"wrote {out}"


def test_models_and_checkpoints_on_named_sets(done_run: LocalRun, tiny: Path, prompts: Path, tmp_path: Path):
    file = tmp_path / "counting.yaml"
    values = {"run": {"steps": 1}, "model": {"path": "unused"}, "data": {"path": str(prompts), "max_prompt_tokens": 64}}
    file.write_text(
        yaml.safe_dump(values | {"rollout": {"max_new_tokens": 4}, "reward": {"function": "regex", "options": {"pattern": "."}}})
    )
    out = tmp_path / "eval.json"
    words = [str(tiny), f"{done_run.run.root}@2", "--set", f"any={file}", "--set", f"again={file}", "--samples", "4", "--prompts", "3"]
    assert cli.main(["eval", *words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(r["model"], r["name"]) for r in found] == [(w, n) for w in words[:2] for n in ("any", "again")]
    assert list(found[0]["pass_at"]) == ["1", "2", "4"]
    assert found[0]["rows"] == found[1]["rows"], "the same model on the same prompts with the same seed"
    assert all(row["prompt"].startswith("counting.jsonl:") for row in found[0]["rows"])
    for result in found:
        shares = [sum(r) / len(r) for r in (row["rewards"] for row in result["rows"])]
        assert result["pass_at"]["1"]["value"] == pytest.approx(math.fsum(shares) / 3)


def test_options_that_an_evaluation_does_not_read_are_refused(done_run: LocalRun, tiny: Path, tmp_path: Path):
    config = load_config(done_run.run.config)
    with pytest.raises(ConfigError, match=r"rollout.temperature=0.5: an evaluation samples by --samples and --temperature"):
        EvalSet.of("s", config, ["rollout.temperature=0.5"])
    assert EvalSet.of("s", config, ["rollout.max_new_tokens=9"]).config.rollout.max_new_tokens == 9
    for words, files, message in (
        ([], [], "nothing to measure"),
        ([str(tmp_path)], [], "neither a run nor a Hugging Face model directory"),
        ([str(tiny)], [], "a model alone has no prompts"),
        ([str(tiny)], ["math"], "give NAME=FILE"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(measured_targets(words, files, [], tmp_path))


def test_a_taught_run_is_measured_as_it_would_answer(tmp_path: Path, tiny: Path, prompts: Path):
    """Supervised fine-tuning names no reward; its set takes one from the command line."""
    values = {
        "run": {"steps": 1},
        "model": {"path": str(tiny)},
        "data": {"path": str(prompts), "columns": {"demonstration": "answer"}},
        "algorithm": {"name": "sft"},
    }
    made = EvalSet.of("s", load_config(values), ["reward.function=regex", "reward.options={pattern: x}"])
    assert made.config.algorithm.name == "grpo"
    assert (made.config.reward.function, made.config.data.columns) == ("regex", {})
