"""The run file: what is accepted, and how a mistake is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from verst.config.load import dump_config, load_config, option_names
from verst.config.schema import Config
from verst.errors import ConfigError

MINIMAL = {"run": {"steps": 3}, "model": {"path": "models/tiny"}}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_every_option_has_earned_its_place():
    # Not a limit of taste: each option is documented, honoured and tested. Raise the number together with the reason, in the changelog.
    assert len(option_names()) == 70


def test_resolved_config_reads_back_to_itself(tmp_path: Path):
    config = load_config(MINIMAL, ["algorithm.name=sft", "train.betas=[0.8, 0.99]"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_overrides_win_and_are_read_as_yaml():
    config = load_config(MINIMAL, ["train.lr=1e-5", "data.path=null", "rollout.stop=['</a>', x]", "run.name=night"])
    assert (config.train.lr, config.data.path, config.rollout.stop, config.run.name) == (1e-5, None, ["</a>", "x"], "night")


def test_the_callers_mapping_is_left_alone():
    values = {"run": {"steps": 3}, "model": {"path": "m"}}
    load_config(values, ["run.steps=5"])
    assert values == {"run": {"steps": 3}, "model": {"path": "m"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run: {steps: 3}\nmodel: {path: m}\ntrain:\n  learning_rate: 1\n",
            r"run\.yaml:4: unknown option train\.learning_rate; valid here: .*lr",
        ),
        (
            "run: {steps: 3}\nmodel: {path: m}\ntrain:\n  warmup_step: 1\n",
            r"run\.yaml:4: unknown option .*did you mean train\.warmup_steps\?",
        ),
        ("run: {steps: 3}\nmodel: {path: m}\nlr: 1\n", r"run\.yaml:3: unknown option lr; did you mean train\.lr\?"),
        (
            "run: {steps: 3}\nmodel: {path: m}\nalgorithm: {name: grpo, clip_hi: 1}\n",
            r"algorithm\.clip_hi; did you mean algorithm\.clip_high\?",
        ),
        (
            "run: {steps: 3}\nmodel: {path: m}\nalgorithm: {name: ppo}\n",
            r"algorithm\.name: 'ppo' is not an algorithm; there are: grpo, sft",
        ),
        ("run: {steps: 3}\nmodel: {path: m}\nalgorithm: {clip_low: 0.1}\n", r"algorithm\.name is required: grpo or sft"),
        ("run: {steps: three}\nmodel: {path: m}\n", r"run\.yaml:1: run\.steps: .*integer.*got 'three'"),
        ("run: {steps: 0}\nmodel: {path: m}\n", r"run\.steps: .*greater than 0"),
        ("run: {steps: 3}\n", r"model is required"),
        ("run: {steps: 3}\nmodel: {path: m}\nrollout: {group_size: 1}\n", r"rollout\.group_size is 1, but grpo's baseline"),
        (
            "run: {steps: 3}\nmodel: {path: m}\nrollout: {capacity_groups: 3}\n",
            r"capacity_groups \(3\) is below train\.groups_per_step \(16\)",
        ),
        ("run: {steps: 3}\nmodel: {path: m}\neval: {every_steps: 3}\n", r"needs data\.holdout > 0"),
        ("run: {steps: 3}\nmodel: {path: m}\ndata: {path: a.jsonl, task: chain_sum}\n", r"both set: keep one"),
        ("run: {steps: 3, steps: 4}\nmodel: {path: m}\n", r"run\.yaml:1: run\.steps is set twice"),
        ("run: {name: ../up, steps: 4}\nmodel: {path: m}\n", r"run\.name: .*pattern"),
        ("- a\n", r"a run file is a mapping of sections .* found list"),
        ("", r"a run file is a mapping of sections .* found NoneType"),
        ("run: [\n", r"not valid YAML"),
        (
            "run: {steps: 3}\nmodel: {path: m}\ntrain: {microbatch_tokens: 100}\n",
            r"microbatch_tokens \(100\) is below the longest trajectory \(1280",
        ),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train..lr=3", "expected KEY=VALUE"),
        ("train.lr=[", "not valid YAML"),
        ("run.steps.deep=3", "steps is not a section"),
        ("train.lrr=3", r"did you mean train\.lr\?"),
    ],
)
def test_bad_overrides_are_explained(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(MINIMAL, [override])


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config({"run": {"stps": 3}, "model": {"path": "m", "dtyp": "x"}})
    assert len(str(caught.value).splitlines()) == 3  # two unknown options and the missing run.steps


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_unreadable_file(tmp_path: Path, kind: str):
    with pytest.raises(ConfigError, match=r"no such run file|cannot be read"):
        load_config(tmp_path / "none.yaml" if kind == "missing" else tmp_path)


def test_every_option_is_described():
    def undescribed(model: Any, prefix: str) -> list[str]:
        return [
            f"{prefix}{n}" for n, f in model.model_fields.items() if f.description is None and not hasattr(f.annotation, "model_fields")
        ]

    sections = {n: f.annotation for n, f in Config.model_fields.items() if hasattr(f.annotation, "model_fields")}
    missing = [name for section, model in sections.items() for name in undescribed(model, f"{section}.")]
    assert missing == []


def test_yaml_of_the_resolved_config_is_plain():
    assert yaml.safe_load(dump_config(load_config(MINIMAL)))["algorithm"]["name"] == "grpo"
