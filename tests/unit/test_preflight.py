"""What is found before any process is started: names, references, model limits, data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_startup import loaded_by
from verst import cli
from verst.config.load import load_config
from verst.errors import ConfigError, DataError, ExtensionError, ModelError
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import Findings, preflight
from verst.testing import tiny_model
from verst.types import Completion, Message, Prompt, Reply

ROWS = [{"prompt": f"count {i}", "answer": str(i)} for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")  # of 1024 positions


def check(model: Path, *overrides: str, rows: Any = ROWS, **extensions: Any) -> Findings:
    values = {"run": {"steps": 3}, "model": {"path": str(model)}, "data": {"max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 8}}
    return preflight(load_config(values, overrides), Extensions(prompts=rows, **extensions))


def test_a_model_whose_experts_cannot_be_read_is_refused_unless_routes_are_ignored(tmp_path: Path, model: Path):
    strange = tmp_path / "model"
    shutil.copytree(model, strange)
    about = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(about | {"moe_num_experts": 8, "moe_k": 2}))
    with pytest.raises(ConfigError, match=r"train.routes: .* has experts \(moe_num_experts in its config.json\), .*train.routes=ignore"):
        check(strange)
    check(strange, "train.routes=ignore")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.function=exact_mach", r"reward 'exact_mach' is not shipped with Verst; nearest: exact_match \(shipped: .*regex"),
        ("rollout.environment=single_tern", r"environment 'single_tern' is not shipped with Verst; nearest: single_turn"),
        ("reward.function=':score'", r"reward ':score' is not of the form `module:name`"),
        ("reward.function='mine:'", r"reward 'mine:' is not of the form"),
        ("reward.function=rewards/mine.py:score", r"'rewards/mine\.py:score' is not of the form .*no path, no \.py"),
        ("reward.function='a:b:c'", r"'a:b:c' is not of the form `module:name`: one colon"),
        ("algorithm={name: grpo, loss: grpo}", r"loss 'grpo' is not shipped with Verst"),
        ("algorithm={name: rloo, advantages: 'no_such_module:mine'}", r"advantages 'no_such_module:mine': no module 'no_such_module' in"),
        ("rollout.environment=rollout:no_such_module:f", "rollout 'no_such_module:f': no module 'no_such_module'"),
        ("rollout.environment=slime:no_such_module:f", "slime 'no_such_module:f': no module 'no_such_module'"),
        ("rollout.environment=agent:single_turn", r"agent 'single_turn' is not shipped with Verst"),
        ("rollout.environment=agent:no_such_module:solve", r"agent 'no_such_module:solve': no module 'no_such_module' in"),
        ("rollout.environment='my-env:Env'", r"environment 'my-env:Env' is not of the form"),
        ("reward.function=no_such_module_here:score", r"no module 'no_such_module_here' in .* or among the installed packages"),
        ("reward.function=__main__:score", r"no module '__main__'"),
        ("reward.function=trl:no_such_module_here:score", r"no module 'no_such_module_here'"),
        (
            "reward.function=trl:tests.loop.rewards:spread",
            r"\(trajectory, fields\), which TRL could not call .*expected: def reward\(prompts",
        ),
        ("reward.options={strip: true, feild: x}", r"nearest: field"),
        ("reward.function=regex", r"reward Regex.*missing a required argument: 'pattern'"),
        ("rollout.environment_options={tries: 2}", r"environment SingleTurn.*unexpected keyword argument 'tries'"),
    ],
)
def test_names_references_and_options_of_user_code(model: Path, override: str, message: str):
    with pytest.raises(ExtensionError, match=message):
        check(model, override)


def test_options_of_shipped_code_are_tried(model: Path):
    with pytest.raises(ExtensionError, match="is not a regular expression"):
        check(model, "reward.function=regex", "reward.options={pattern: '('}")
    with pytest.raises(ExtensionError, match=r"environment 'second_try' does not take .*tries is 0"):
        check(model, "rollout.environment=second_try", "rollout.environment_options={tries: 0}")


def test_a_module_that_is_there_is_found_and_not_imported(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = "def score(trajectory, fields): ...\nasync def solve(session, prompt): ...\nfrom elsewhere import Env\n"
    (tmp_path / "mine.py").write_text(f"raise AssertionError('imported')\n{source}")
    monkeypatch.chdir(tmp_path)
    check(model, "reward.function=mine:score", "rollout.environment=mine:Env", "rollout.max_turns=3")
    check(model, "rollout.environment=agent:mine:solve", "rollout.max_turns=3")


def test_turns_must_fit_the_environment(model: Path):
    with pytest.raises(ConfigError, match=r"rollout\.max_turns is 2, but the environment single_turn ends after one"):
        check(model, "rollout.max_turns=2")
    second = "rollout.environment=second_try"
    with pytest.raises(ConfigError, match=r"rollout\.max_turns is 1, so second_try could not have its 2 turns: raise it to 2"):
        check(model, second)
    with pytest.raises(ConfigError, match=r"rollout\.max_turns is 2, so second_try could not have its 3 turns"):
        check(model, second, "rollout.environment_options={tries: 3}", "rollout.max_turns=2")
    check(model, second, "rollout.max_turns=2")
    with pytest.raises(ConfigError, match=r"so guessing could not have its 8 turns"):
        check(model, "rollout.environment=guessing", "rollout.max_turns=7")


class Talkative:
    """Goes on for as long as it may."""

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        return prompt.messages

    async def reply(self, completion: Completion) -> Reply:
        return Reply((Message("user", "and?"),), done=False)


def test_objects_from_python_are_checked_too(model: Path):
    def takes_too_much(trajectory: Any, fields: Mapping[str, Any], weight: float) -> float:
        return weight

    check(model, "rollout.max_turns=2", environment=Talkative, reward=lambda trajectory, fields: 0.0)
    check(model, "reward.options={weight: 2}", reward=takes_too_much)
    with pytest.raises(ExtensionError, match=r"missing a required argument: 'weight'"):
        check(model, reward=takes_too_much)
    with pytest.raises(ExtensionError, match=r"environment"):
        check(model, environment=Talkative())
    with pytest.raises(ConfigError, match=r"sft without eval\.every_steps or eval\.sets uses neither"):
        check(model, "algorithm.name=sft", "data.columns.demonstration=answer", reward=takes_too_much)


def test_a_trajectory_longer_than_the_model_was_made_for(model: Path, tmp_path: Path):
    check(model, "rollout.max_new_tokens=960")
    with pytest.raises(ModelError, match=r"may have 1025 tokens .* is made for 1024 \(max_position_embeddings\)"):
        check(model, "rollout.max_new_tokens=961")
    unsaid = tmp_path / "unsaid"
    tiny_model(unsaid)
    values = json.loads((unsaid / "config.json").read_text())
    del values["max_position_embeddings"]
    (unsaid / "config.json").write_text(json.dumps(values))
    check(unsaid, "rollout.max_new_tokens=961")


def test_too_few_prompts_for_evaluation(model: Path):
    evaluates = ("eval.every_steps=1", "data.holdout=0.3")
    with pytest.raises(DataError, match=r"30 different held-out prompts wanted, \d+ found in 40 rows .* lower eval\.prompts"):
        check(model, *evaluates, "eval.prompts=30")
    check(model, *evaluates, "eval.prompts=3")


def test_an_iterator_cannot_be_shuffled(model: Path):
    with pytest.raises(ConfigError, match=r"data\.shuffle does not apply: an iterator is read one row after another"):
        check(model, "data.shuffle=true", rows=lambda: iter(ROWS))
    check(model, "data.shuffle=true")
    check(model, rows=lambda: iter(ROWS))


def test_warnings_and_the_stream_before_its_first_prompt_are_returned(model: Path):
    found = check(model, "rollout.top_p=0.9")
    assert [warning.split(":")[0] for warning in found.warnings] == ["rollout.top_p"]
    assert (found.stream["epoch"], found.stream["window"], found.stream["row"]) == (0, 0, 0)
    assert found.stream["of"]["source"] == {"rows": 40}


def run_file(directory: Path, model: Path, **rollout: Any) -> Path:
    path = directory / "run.yaml"
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "run": {"steps": 3},
        "model": {"path": str(model)},
        "data": {"path": str(directory / "data.jsonl"), "max_prompt_tokens": 64},
        "rollout": rollout,
    }
    path.write_text(json.dumps(values))  # which is YAML too
    return path


def test_check_prints_what_can_be_read_back_the_plan_and_the_warnings(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", str(run_file(tmp_path, model, top_k=5))]) == 0
    resolved, _, plan = capsys.readouterr().out.partition("# plan")
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load_config(tmp_path / "resolved.yaml") == load_config(tmp_path / "run.yaml")
    assert "warning: rollout.top_k: log-probabilities" in plan
    assert cli.main(["check", str(run_file(tmp_path, model, environment="second_tri"))]) == 1
    assert "nearest: second_try" in capsys.readouterr().err


def test_check_needs_neither_torch_nor_ray(model: Path, tmp_path: Path):
    code = f"import verst.cli; assert verst.cli.main(['check', {str(run_file(tmp_path, model))!r}]) == 0"
    assert not loaded_by(code) & {"torch", "transformers", "ray"}
