"""The configuration reference and the JSON schema: current, complete, and of one mind with the schema they are made from."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from verst import cli
from verst.config.algorithms import PRESETS
from verst.config.checks import inapplicable
from verst.config.load import load_config, option_names
from verst.config.reference import json_schema, markdown
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.runtime.changes import CHANGEABLE

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
MINIMAL: dict[str, Any] = {"run": {"steps": 3}, "model": {"path": "m"}}
PAGE = markdown(CHANGEABLE)
VALIDATOR = Draft202012Validator(json_schema())


def test_the_page_is_current():
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == PAGE, "docs/configuration.md is not current: run `verst schema --markdown > docs/configuration.md`"


def test_every_option_has_a_row_with_its_description():
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    for name in {name for preset in PRESETS for name in option_names(preset)}:
        what = rows[name].split(" | ")[3]
        assert len(what.split()) > 2, f"{name} has no description"
        assert ("↻" in rows[name]) == (name in CHANGEABLE)
    assert {"kind", "level", "lower", "upper"} <= rows.keys()  # of corrections


def test_types_and_limits_are_in_plain_words():
    for row in (
        "| `run.steps` ↻ | whole number from 1 | required | Steps to train;",
        "| `train.lr` | number above 0, up to 1 | `1e-06` |",
        "| `train.betas` | list of 2: number from 0, below 1 | `[0.9, 0.95]` |",
        "| `eval.temperature` | `0`, or number from 0.01, up to 100 | `0.0` |",
        "| `tracking.prometheus_port` ↻ | `auto`, or whole number from 0, up to 65535 | `0` |",
        "| `weights.transport` | `file`, `group`, `shared` | none |",
        "| `algorithm.clip_high` | number above 0 | `0.2`; `0.28`: dapo; `0.0004`: gspo; `4.0`: cispo | The ratio is clipped above",
        "| `algorithm.reward_above` | number from 0 | `0.0` |",
    ):
        assert row in PAGE


def test_an_option_that_some_algorithms_lack_says_which():
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `algorithm.")}
    assert "Not of rloo, distill, best_of_n, online_dpo, dpo, sft." in rows["algorithm.clip_low"]
    assert "Only of best_of_n." in rows["algorithm.reward_above"]
    assert "Only of online_dpo, dpo." in rows["algorithm.beta"]
    assert "Not of online_dpo, dpo." in rows["algorithm.aggregate"]
    assert "Only of" not in rows["algorithm.aggregate"]


def test_every_reason_that_an_option_is_not_read_is_there():
    """Over many runs, so that a new rule that the page's few runs do not show is found."""
    needed = {"distill": {"teacher": "m"}}
    algorithms = (*({"name": preset, **needed.get(preset, {})} for preset in PRESETS), {"name": "grpo", "kl_coefficient": 0.1})
    trackings = ({"trackers": []}, {"trackers": ["wandb"]}, {"trackers": ["tensorboard"], "prometheus_port": "auto"})
    for algorithm, tracking, every, task in product(algorithms, trackings, (0, 5), (None, "chain_sum")):
        data, evaluation = {"holdout": 0.1, "task": task}, {"every_steps": every}
        config = Config.model_validate(MINIMAL | {"algorithm": algorithm, "tracking": tracking, "eval": evaluation, "data": data})
        for key, reason in inapplicable(config).items():
            assert f"Not read: {reason}." in PAGE, f"{key}: no run of verst.config.reference has this reason"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_the_schema_accepts_every_example(path: Path):
    assert not list(VALIDATOR.iter_errors(yaml.safe_load(path.read_text())))


def test_the_schema_accepts_a_resolved_run(tmp_path: Path):
    for path in EXAMPLES:
        assert not list(VALIDATOR.iter_errors(load_config(path).model_dump(mode="json")))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"learning_rate": 1e-5}}, "'learning_rate' was unexpected"),
        ({"trian": {}}, "'trian' was unexpected"),
        ({"train": {"lr": "fast"}}, "'fast' is not of type 'number'"),
        ({"train": {"lr": 0}}, "0 is less than or equal to the minimum of 0"),
        ({"train": {"ranks": 1.5}}, "1.5 is not of type 'integer'"),
        ({"train": {"ranks": True}}, "True is not of type 'integer'"),
        ({"train": {"betas": [0.9, 1.0]}}, "1.0 is greater than or equal to the maximum of 1"),
        ({"data": {"holdout": 1}}, "1 is greater than or equal to the maximum of 1"),
        ({"rollout": {"engine": "vllm"}}, "'vllm' is not one of"),
        ({"eval": {"temperature": 0.001}}, "0.001 is not valid under any of the given schemas"),
        ({"tracking": {"trackers": ["wandb", "wandb"]}}, "has non-unique elements"),
        ({"tracking": {"prometheus_port": 70000}}, "70000 is not valid under any of the given schemas"),
        ({"algorithm": {"name": "grpo", "corrections": [{"kind": "mask"}]}}, "is not valid under any of the given schemas"),
        ({"algorithm": {"clip_low": 0.1}}, "is not valid under any of the given schemas"),
        ({"algorithm": {"name": "trpo"}}, "is not valid under any of the given schemas"),
        ({"run": {"name": "r"}}, "'steps' is a required property"),
    ],
)
def test_what_the_schema_refuses_verst_refuses_too(section: dict[str, Any], message: str):
    errors = [error.message for error in VALIDATOR.iter_errors(MINIMAL | section)]
    assert any(message in error for error in errors), errors
    with pytest.raises(ConfigError):
        load_config(MINIMAL | section)


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(printed)
    assert printed == json_schema()
    assert cli.main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE
