"""`run.changes`: what holds in which step, what is refused, and what a resumed run may still say."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fsdp_cases import BATCHES, advantages_of, make_backend, make_config, path
from verst.config.load import dump_config, load_config
from verst.config.plan import plan_lines
from verst.config.scheduled import SCHEDULABLE, changed_at, config_at, value_of
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.journal.log import Journal
from verst.journal.records import BatchRecord
from verst.runtime.changes import change, unrecorded
from verst.runtime.rundir import RunDirectory
from verst.testing import tiny_model

__all__ = ["path"]  # a fixture

CHANGES = "run.changes=[{step: 3, options: {train.lr: 1e-4, algorithm.clip_high: 0.5}}, {step: 7, options: {train.lr: 1e-5}}]"


def config_of(*overrides: str, **values: Any) -> Config:
    return load_config({"run": {"steps": 10}, "model": {"path": "m"}, "train": {"lr": 1e-3}} | values, overrides)


def test_what_holds_in_each_step():
    config = config_of(CHANGES)
    assert [config_at(config, step).train.lr for step in (1, 2, 3, 6, 7, 10)] == [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    assert [value_of(config_at(config, step), "algorithm.clip_high") for step in (2, 3, 10)] == [0.2, 0.5, 0.5]
    assert changed_at(config, 3) == {"train.lr": (1e-3, 1e-4), "algorithm.clip_high": (0.2, 0.5)}
    assert changed_at(config, 7) == {"train.lr": (1e-4, 1e-5)}
    assert changed_at(config, 4) == {}
    assert config_at(config_of(), 5) == config_of()


def test_it_reads_back_from_the_run_directory(tmp_path: Path):
    config = config_of(CHANGES)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_check_tells_of_it(tmp_path: Path):
    config = config_of(CHANGES, model={"path": str(tiny_model(tmp_path / "tiny"))})
    assert [line for line in plan_lines(config) if line.startswith("from step")] == [
        "from step 3: train.lr 0.001 -> 0.0001",
        "from step 3: algorithm.clip_high 0.2 -> 0.5",
        "from step 7: train.lr 0.0001 -> 1e-05",
    ]


@pytest.mark.parametrize("key", SCHEDULABLE)
def test_every_option_that_may_change_is_one(key: str):
    name = {"algorithm.beta": "online_dpo", "algorithm.reward_above": "best_of_n"}.get(key, "grpo")
    algorithm = {"name": name} | ({"kl_coefficient": 0.1} if key.endswith("kl_coefficient") else {})
    value = not value_of(config_of(algorithm=algorithm), key) if key.endswith(("_std", "_sampling")) else 0.625
    config = config_of(f"run.changes=[{{step: 5, options: {{{key}: {value}}}}}]", algorithm=algorithm)
    assert [value_of(config_at(config, step), key) == value for step in (4, 5)] == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("[{step: 1, options: {train.lr: 1e-4}}]", r"run\.changes.*step.*2"),
        ("[{step: 11, options: {train.lr: 1e-4}}]", r"run\.changes has step 11, but run\.steps is 10"),
        ("[{step: 2, options: {}}]", r"run\.changes.*options"),
        ("[{step: 3, options: {train.lr: 1}}, {step: 2, options: {train.lr: 1}}]", "has the steps 3, 2: write them in order"),
        ("[{step: 2, options: {rollout.temperature: 0.5}}]", r"step 2: rollout\.temperature cannot change at a step; what can: train\.lr,"),
        ("[{step: 2, options: {algorithm.beta: 0.5}}]", r"grpo has no algorithm\.beta"),
        ("[{step: 2, options: {algorithm.kl_coefficient: 0.5}}]", "is 0 before, so no reference model is kept"),
        ("[{step: 2, options: {train.lr: fast}}]", r"train\.lr cannot be 'fast': Input should be a valid number"),
        ("[{step: 2, options: {train.lr: 0}}]", r"train\.lr cannot be 0: Input should be greater than 0"),
    ],
)
def test_what_cannot_change_is_told_at_the_start(changes: str, message: str):
    with pytest.raises(ConfigError, match=message):
        config_of(f"run.changes={changes}")


@pytest.mark.parametrize(
    ("own", "changed"),
    [("loss", "algorithm.clip_low: 0.1"), ("loss", "algorithm.clip_high: 0.1"), ("advantages", "algorithm.normalize_std: false")],
)
def test_a_change_of_what_is_never_read_is_refused(own: str, changed: str):
    changes = f"run.changes=[{{step: 2, options: {{{changed}}}}}]"
    config_of(changes)
    key = changed.partition(":")[0].replace(".", r"\.")
    with pytest.raises(ConfigError, match=rf"run\.changes, step 2: {key} does not apply: algorithm\.{own}, your own"):
        config_of(changes, algorithm={"name": "grpo", own: f"own:{own}"})


def test_a_backend_trains_each_step_by_what_holds_in_it(path: str):
    """The rate, the clip and the loss: in step 2 alone they differ from those of a run without changes."""
    options = {"algorithm": {"name": "grpo", "kl_coefficient": 0.1}, "train": {"clip_norm": 1e6}}
    second = {"train.lr": 5e-3, "train.clip_norm": 1e-3, "algorithm.kl_coefficient": 50.0}
    changes = [{"step": 2, "options": second}, {"step": 3, "options": {"train.lr": 1e-2}}]
    reports = []
    for run in ({"steps": 3}, {"steps": 3, "changes": changes}):
        config = make_config(path, run=run, **options)
        backend = make_backend(config)
        reports.append([])
        for batch in BATCHES:
            scores = backend.load_batch(batch)
            tally = backend.forward_backward(0, advantages_of(config, batch, scores.reference_kl))
            reports[-1].append(tally.merge(backend.optimizer_step(0)).report())
    plain, changed = reports
    assert plain[0] == changed[0]
    assert [report["update/lr"] for report in changed] == [1e-2, 5e-3, 1e-2]
    assert changed[1]["policy/kl"] == plain[1]["policy/kl"] > 0  # the weights are still the same
    assert changed[1]["loss/total"] == pytest.approx(plain[1]["loss/total"] + 49.9 * plain[1]["policy/kl"], rel=1e-4)


def made(directory: Path) -> tuple[RunDirectory, Config]:
    config = config_of(CHANGES, run={"name": "r", "dir": str(directory), "steps": 10})
    return RunDirectory.open(RunDirectory.create(config, None, {}).root)


def test_a_resumed_run_may_say_anew_what_is_to_come(tmp_path: Path):
    run, config = made(tmp_path)
    with closing(Journal.open(run.journal, run.run_id)) as journal:
        for step in (1, 2, 3, 4):
            journal.append_batch(BatchRecord(step, ()))
    told: list[str] = []
    new = change(
        run,
        config,
        ["run.changes=[{step: 3, options: {train.lr: 1e-4, algorithm.clip_high: 0.5}}, {step: 5, options: {train.lr: 1e-6}}]"],
        told.append,
    )
    assert [config_at(new, step).train.lr for step in (4, 5, 10)] == [1e-4, 1e-6, 1e-6]
    assert len(told) == 1
    assert told[0].startswith("run.changes: ")
    for asked in ("[]", "[{step: 4, options: {train.lr: 1e-6}}]", "[{step: 3, options: {train.lr: 1e-4}}]"):
        with pytest.raises(ConfigError, match=r"run.changes cannot be changed in a run: step [34] has been made.* give a step after 4"):
            change(*RunDirectory.open(run.root), [f"run.changes={asked}"], print)


def test_a_run_file_edited_by_hand_is_noticed(tmp_path: Path):
    """A replay that comes out otherwise names it among the likely causes."""
    run, config = made(tmp_path)
    edited = load_config(run.config, [CHANGES.replace("1e-4", "1e-5")])
    found = unrecorded(run, config.model_dump(mode="json"), edited)
    assert list(found) == ["run.changes"]
    assert unrecorded(run, config.model_dump(mode="json"), config) == {}
