"""The sets that a run evaluates: which prompts, how they are counted, and that replicas have the time for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.loop.fakes import config, group
from verst.config.evaluated import Evaluated
from verst.config.schema import Config
from verst.data.sources import open_source
from verst.errors import DataError
from verst.runtime.eval_sets import EvalSets, metrics_of
from verst.runtime.limits import evaluated_trajectories
from verst.runtime.outlets import public_options
from verst.types import Group, Prompt


def test_pass_at_k_by_hand():
    """Four samples of three prompts. Of 2 right ones among 4, pass@2 is 1 - C(2, 2) / C(4, 2) = 5/6 (Chen et al. 2021, eq. 1)."""
    one = Evaluated("math", 3, 1, 1.0, samples=4)
    groups = [group(0, 0, (1.0, 1.0, 0.0, 0.5)), group(1, 0, (0.0, 0.0, 0.0, 0.0)), group(2, 0, (1.0, 0.0, 0.0, None))]
    found = metrics_of(one, groups)
    assert found["eval/math/reward"] == pytest.approx((2.5 / 4 + 0 + 1 / 3) / 3)
    assert found["eval/math/pass_at_1"] == pytest.approx((2 / 4 + 0 + 1 / 3) / 3)
    assert found["eval/math/pass_at_2"] == pytest.approx((5 / 6 + 0 + 2 / 3) / 3)
    assert found["eval/math/pass_at_4"] == pytest.approx((1 + 0) / 2)  # of the third prompt one sample could not be scored
    assert found["eval/math/failed"] == pytest.approx(1 / 12)


def test_what_nobody_could_score_is_unknown():
    assert metrics_of(Evaluated("", 1, 1, 0.0), [group(0, 0, (None,))]) == {"eval/failed": 1.0, "eval/generated_tokens": 1.0}


def file_of(directory: Path, texts: list[str]) -> str:
    path = directory / "set.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    return str(path)


def with_sets(path: str, **second: Any) -> Config:
    sets = {
        "few": {"path": path, "columns": {"prompt": "question"}, "every_steps": 2, "prompts": 9},
        "task": {"task": "chain_sum", "every_steps": 3, "prompts": 2, "samples": 4, "temperature": 1.0, "system": "Add.", **second},
    }
    return config(data={"system": "Answer.", "task": "aiw"}, eval={"sets": sets})


async def test_prompts_are_each_text_once_and_their_numbers_are_their_own(tmp_path: Path):
    cfg = with_sets(file_of(tmp_path, ["a", "b", "a"]))
    made = EvalSets.of(cfg, open_source(cfg.data))
    assert [[m.content for m in p.messages] for p in made.prompts["few"]] == [["Answer.", "a"], ["Answer.", "b"]]
    assert [p.messages[0].content for p in made.prompts["task"]] == ["Add."] * 2
    asked: dict[int, str] = {}

    async def roll(seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        assert seq not in asked
        asked[seq] = how
        return b"", group(seq, 0)

    assert set(await made.measure(2, roll)) == {f"eval/few/{name}" for name in ("reward", "failed", "generated_tokens")}
    assert asked == {-1: "evaluation of few", -2: "evaluation of few"}
    asked.clear()
    await made.measure(3, roll)  # the last step: all sets
    assert asked == {-1: "evaluation of few", -2: "evaluation of few", -3: "evaluation of task", -4: "evaluation of task"}
    assert evaluated_trajectories(cfg) == 9 + 2 * 4  # what replicas have to allow for


def test_a_set_that_cannot_be_read_is_named(tmp_path: Path):
    cfg = with_sets(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"^eval\.sets\.few: data\.path .*none\.jsonl does not exist"):
        EvalSets.of(cfg, open_source(cfg.data))
    path = file_of(tmp_path, ["a"])
    Path(path).write_text("\n")
    with pytest.raises(DataError, match=r"^eval\.sets\.few: no prompt in 0 rows"):
        EvalSets.of(with_sets(path), open_source(cfg.data))


def test_what_may_hold_keys_reaches_no_tracker(tmp_path: Path):
    shown = public_options(with_sets(file_of(tmp_path, ["a"]), options={"token": "hush"}))
    assert shown["eval.sets"]["task"]["samples"] == 4
    assert "hush" not in json.dumps(shown)
