"""The comparison with TRL: both sides get the same task, are read alike, and what is missing is told with the commands that make it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import vs_trl_reward
from benchmarks.vs_trl import (
    ROOT,
    TRL_LINE,
    VERST_LINE,
    Reported,
    Side,
    environment,
    follow,
    main,
    measure,
    parsed,
    summary,
    verst_values,
    write_task,
)
from verst.config.load import load_config
from verst.observe.terminal import step_line

REPORTS = """
import os, time
for step in range({steps}):
    time.sleep({pause_s})
    print("noise")
    print(f"step {{step + 1}}/9  reward 0.{{step}}  loss +0.0000", os.environ.get("OMP_NUM_THREADS"))
"""


def side(*rewards: float, first_s: float = 2.0, step_s: float = 0.5) -> Side:
    return Side([Reported(first_s + i * step_s, reward) for i, reward in enumerate(rewards)])


def test_a_side_worked_by_hand():
    one = side(0.2, 0.4, 0.95, 0.8, 0.97, 1.0, 1.0)
    assert (one.first_reward_s, one.steps_to_goal, one.goal_s) == (2.0, 3, 3.0)
    assert one.steps_per_s == pytest.approx(2.0)  # steps 6 and 7 in the second after step 5
    assert (side(0.2, 0.3).steps_to_goal, side(0.2, 0.3).goal_s) == (None, None)


def test_the_summary_takes_medians_over_pairs():
    rewards = (0.2, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9)
    pairs = [(side(*rewards, first_s=f, step_s=s), side(*rewards, step_s=0.5)) for f, s in ((1.0, 0.25), (9.0, 0.5), (3.0, 0.1))]
    found = summary(pairs)
    assert (found["first_reward_s"], found["trl_first_reward_s"], found["trl_reward_09_s"]) == (3.0, 2.0, 2.5)
    assert found["reward_09_s"] == pytest.approx(3.1)
    assert found["steps_per_s_ratio"] == pytest.approx(2.0)
    assert (found["steps_to_09"], found["trl_steps_to_09"]) == (2, 2)
    assert summary([*pairs, (side(*[0.2] * 7), pairs[0][1])])["reward_09_s"] is None  # one of the runs did not reach it


def test_lines_of_both_sides_are_read():
    line = step_line(3, 40, {"reward": 0.9123, "loss/total": 0.1, "time/step_s": 0.2})
    assert (found := VERST_LINE.match(line)) is not None
    assert found["reward"] == "0.912"
    for value in ("'0.9123'", "0.9123"):  # transformers 5 prints text, 4 numbers
        found = TRL_LINE.match(f"{{'loss': '-0.01', 'rewards/of_batch/mean': '0.5', 'reward': {value}, 'reward_std': '0.1'}}")
        assert found is not None
        assert found["reward"] == "0.9123"
    assert TRL_LINE.match("{'train_runtime': '13.19', 'train_loss': '-0.0018'}") is None


def test_a_command_is_followed_to_its_end(tmp_path: Path):
    program = [sys.executable, "-u", "-c", REPORTS.format(steps=3, pause_s=0.05)]
    found = follow(program, VERST_LINE, 3, cwd=tmp_path, env=environment(5))
    assert [step.reward for step in found.steps] == [0.0, 0.1, 0.2]
    assert found.first_reward_s > 0.05  # the start of the process counts
    assert found.steps[2].at_s - found.steps[0].at_s > 0.09


@pytest.mark.parametrize(
    ("program", "told"), [("raise ValueError('no model')", "no model"), (REPORTS.format(steps=2, pause_s=0), "2 of 3")]
)
def test_a_side_that_fails_ends_the_benchmark(tmp_path: Path, program: str, told: str):
    with pytest.raises(SystemExit, match=told):
        follow([sys.executable, "-c", program], VERST_LINE, 3, cwd=tmp_path, env=environment(1))


def test_the_settings_of_verst_fit_its_schema(tmp_path: Path):
    settings = write_task(tmp_path, parsed(["--steps", "7", "--groups", "3", "--group-size", "4", "--lr", "0.01"]))
    config = load_config(verst_values(settings, tmp_path))
    assert (config.train.groups_per_step, config.rollout.group_size, config.run.steps, config.train.lr) == (3, 4, 7, 0.01)
    assert config.capacity_groups == config.train.groups_per_step  # synchronous
    assert config.run.deterministic
    assert len(Path(settings["prompts"]).read_text().splitlines()) == 21
    assert json.loads(json.dumps(settings)) == settings  # as TRL's side reads it


def test_both_sides_reward_alike():
    tokens, mask = np.array([3, 3, 7, 8, 11, 1]), np.array([False, False, True, True, True, True])
    trajectory = SimpleNamespace(tokens_T=tokens, loss_mask_T=mask)
    assert vs_trl_reward.of_trajectory(trajectory, {}) == 0.5
    assert vs_trl_reward.of_batch(completion_ids=[[7, 8, 11, 1], [3]], prompts=["?", "?"]) == [0.5, 1.0]


def test_a_missing_trl_is_told_with_the_commands_that_make_it(tmp_path: Path):
    for python, why in ((tmp_path / "python", "No such file"), (Path(sys.executable), "No package metadata was found for trl")):
        with pytest.raises(SystemExit, match=rf"{why}[\s\S]*pip install -r benchmarks/requirements-trl.txt"):
            measure(parsed(["--trl-python", str(python)]))


def test_what_both_environments_need_is_pinned_alike():
    pins = [
        dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.MULTILINE))
        for file in (ROOT / "requirements.txt", ROOT / "benchmarks" / "requirements-trl.txt")
    ]
    shared = pins[0].keys() & pins[1].keys()
    assert {"torch", "transformers", "tokenizers", "numpy"} <= shared
    assert {name: pins[0][name] for name in shared} == {name: pins[1][name] for name in shared}


def test_help_says_what_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["vs_trl.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "first_reward_s   from the start of the process" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        parsed(["--steps", "6"])
