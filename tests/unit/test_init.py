"""`verst init`: what it writes is a run that `verst check` accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verst import cli
from verst.config.load import load_config
from verst.errors import ConfigError, DataError, ModelError
from verst.recipes.run_file import Asked, Schedule, run_file_text, write_run_file


def test_a_task_becomes_a_run_file_that_check_accepts(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["init", str(tmp_path / "new"), "--task", "chain_sum", "--model", str(tiny)]) == 0
    file = tmp_path / "new" / "run.yaml"
    assert f"wrote {file}" in capsys.readouterr().out
    assert cli.main(["check", str(file)]) == 0
    config = load_config(file)
    assert (config.data.task, config.model.path, config.reward.function) == ("chain_sum", str(tiny), "reasoning_gym")
    assert config.run.name == "chain_sum-tiny-grpo"
    assert config.max_trajectory_tokens <= 1024  # the model's own limit
    assert file.read_text().count("  # ") >= 6
    with pytest.raises(ConfigError, match=r"run.yaml exists already.* such as .*run-2.yaml"):
        write_run_file(file, Asked("chain_sum", str(tiny)))


def rows(path: Path, *given: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


def test_prompts_of_ones_own(tmp_path: Path, tiny: Path):
    many = rows(tmp_path / "m.jsonl", *({"prompt": f"count {i}", "answer": str(i)} for i in range(200)))
    config = load_config(write_run_file(tmp_path / "a.yaml", Asked(many, str(tiny))))
    assert (config.reward.function, config.reward.options) == ("exact_match", {"field": "answer"})
    assert 8 <= config.eval.prompts < 40  # as many as are held out of 200
    asked = rows(tmp_path / "q.jsonl", *({"question": f"what is {i}", "solution": "words " * 9} for i in range(9)))
    config = load_config(write_run_file(tmp_path / "b.yaml", Asked(asked, str(tiny))))
    assert (config.data.columns, config.reward.options) == ({"prompt": "question"}, {"field": "solution"})
    assert config.eval.every_steps == 0  # too few to hold any out


@pytest.mark.parametrize("task", ["file", "chain_sum"])
def test_fine_tuning_on_demonstrations(tmp_path: Path, tiny: Path, task: str):
    given = rows(tmp_path / "d.jsonl", {"prompt": "say", "completion": "long " * 20}) if task == "file" else task
    config = load_config(write_run_file(tmp_path / "run.yml", Asked(given, str(tiny), algorithm="sft")))
    assert config.algorithm.name == "sft"
    assert config.data.columns == {"demonstration": "completion" if task == "file" else "answer"}
    if task == "file":
        assert config.rollout.max_new_tokens >= 100  # tokens of the longest demonstration, byte by byte


@pytest.mark.parametrize(("schedule", "bound"), [("synchronous", 0), ("one-step-off", 1), ("asynchronous", 3)])
def test_schedules_and_their_bounds(tmp_path: Path, tiny: Path, schedule: Schedule, bound: int):
    config = load_config(write_run_file(tmp_path / "r.yaml", Asked("chain_sum", str(tiny), schedule=schedule)))
    assert config.worst_staleness == bound
    with pytest.raises(ConfigError, match="sft samples nothing to run ahead with"):
        write_run_file(tmp_path / "s.yaml", Asked("chain_sum", str(tiny), algorithm="sft", schedule="one-step-off"))


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path, tiny: Path):
    no_answer = rows(tmp_path / "n.jsonl", {"prompt": "a", "grade": "b"})
    no_prompt = rows(tmp_path / "p.jsonl", {"text": "a", "answer": "b"})
    for asked, kind, message in (
        (Asked("chain_sun", str(tiny)), DataError, "nearest: chain_sum"),
        (Asked("chain_sum", str(tmp_path)), ModelError, r"has no config\.json"),
        (Asked(no_answer, str(tiny)), ConfigError, "no column to compare answers with .*module:function of your own"),
        (Asked(no_prompt, str(tiny)), ConfigError, "which column is the prompt\\? There are text, answer"),
        (Asked(no_answer, str(tiny), algorithm="sft"), ConfigError, "which column is the demonstration"),
        (Asked(str(tmp_path / "none.jsonl"), str(tiny)), DataError, "does not exist"),
    ):
        with pytest.raises(kind, match=message):
            write_run_file(tmp_path / "out" / "run.yaml", asked)
    assert not (tmp_path / "out").exists()


def test_paths_that_yaml_would_misread_are_quoted(tmp_path: Path, tiny: Path):
    strange = tmp_path / "model: 1 #x"
    strange.symlink_to(tiny)
    assert load_config(write_run_file(tmp_path / "r.yaml", Asked("chain_sum", str(strange)))).model.path == str(strange)
    assert "engine: sglang" in run_file_text(Asked("chain_sum", str(tiny), engine="sglang"))
