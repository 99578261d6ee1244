"""`verst inspect`: trajectories found in a journal, and shown as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.loop.fakes import group
from tests.loop.local import LocalRun
from tests.unit.test_trajectory_branches import two
from verst import cli
from verst.errors import DataError
from verst.journal.codec import encode_group
from verst.journal.log import Journal, JournalReader
from verst.journal.query import Query, find_trajectory, last_of, select, token_rows
from verst.journal.records import BatchRecord, CommitRecord
from verst.types import NO_VERSION, Status


@pytest.fixture
def journal(tmp_path: Path) -> JournalReader:
    """Groups 0 to 4 of two each: step 1 trained 0 and 1, step 2 trained 2 and dropped 3, nobody has taken 4."""
    written = Journal.create(tmp_path / "journal", "r")
    rewards = {0: (0.0, 1.0), 1: (0.25, 0.75), 2: (1.0, 1.0), 3: (None, None), 4: (0.5, None)}
    for seq, of_group in rewards.items():
        written.append_group(seq, encode_group(group(seq, seq // 2, of_group)))
    written.append_batch(BatchRecord(1, (0, 1)))
    written.append_commit(CommitRecord(1, "d1"))
    written.append_batch(BatchRecord(2, (2,), {3: "no signal"}))
    return JournalReader(tmp_path / "journal")  # while it is open for writing


def ids(journal: JournalReader, **wanted: object) -> list[str]:
    return [found.trajectory.id for found in select(journal, Query(**wanted))]  # type: ignore[arg-type]


def test_filters(journal: JournalReader):
    assert len(ids(journal)) == 10
    assert ids(journal, rewards=(0.25, 0.75)) == ["1/0", "1/1", "4/0"]
    assert ids(journal, rewards=(None, 0.0)) == ["0/0"]
    assert ids(journal, rewards=(1.0, None)) == ["0/1", "2/0", "2/1"]
    assert ids(journal, statuses=frozenset({Status.FAILED})) == ["3/0", "3/1", "4/1"]
    assert ids(journal, steps=(2, 2)) == ["2/0", "2/1", "3/0", "3/1"]
    assert ids(journal, steps=(None, 1), rewards=(0.5, None)) == ["0/1", "1/1"]
    assert ids(journal, prompt="P4") == ["4/0", "4/1"]
    assert ids(journal, prompt="Q", group=1) == ["1/0", "1/1"]  # the text of every prompt
    with pytest.raises(DataError, match="has no group 9; it has groups 0 to 4"):
        ids(journal, group=9)


def test_who_took_a_group_is_known(journal: JournalReader):
    found = {f.group.seq: (f.step, f.dropped) for f in select(journal, Query())}
    assert found == {0: (1, None), 1: (1, None), 2: (2, None), 3: (2, "no signal"), 4: (None, None)}


def test_order_and_limit(journal: JournalReader):
    assert [f.trajectory.id for f in last_of(journal, Query(), limit=3)] == ["3/1", "4/0", "4/1"]
    assert [f.trajectory.id for f in last_of(journal, Query(), limit=3, reverse=True)] == ["1/0", "0/1", "0/0"]
    scored = Query(rewards=(None, 9))
    by_reward = [f.trajectory.reward for f in last_of(journal, scored, order="reward")]
    assert by_reward == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [f.trajectory.reward for f in last_of(journal, scored, order="reward", limit=2, reverse=True)] == [0.25, 0.0]
    assert last_of(journal, Query(), order="reward", limit=1)[0].trajectory.reward is None  # unknown comes last
    assert last_of(journal, Query(), order="step", limit=1)[0].step is None


def test_one_trajectory_token_by_token(journal: JournalReader):
    found = find_trajectory(journal, "1/0")
    rows = token_rows(found.trajectory, lambda token: f"<{token}>")
    given = {"logprob": None, "version": None, "in_loss": False}
    assert rows == [
        {"place": 0, "token": 1, "text": "<1>", **given},
        {"place": 1, "token": 2, "text": "<2>", **given},
        {"place": 2, "token": 3, "text": "<3>", "logprob": -1.0, "version": 0, "in_loss": True},
    ]
    assert (found.mean_logprob, found.versions) == (-1.0, (0, 0))
    for wrong, message in (("1/7", "group 1 has no trajectory 1/7; it has 1/0, 1/1"), ("one", "such as 12/3")):
        with pytest.raises(DataError, match=message):
            find_trajectory(journal, wrong)


def test_a_real_run_by_the_command(done_run: LocalRun, capsys: pytest.CaptureFixture[str]):
    root = str(done_run.run.root)
    assert cli.main(["inspect", root, "--limit", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    reader = done_run_reader(done_run)
    assert len(rows) == sum(len(reader.group(seq).trajectories) for seq in reader.index.groups)
    failed = [row for row in rows if row["status"] == "failed"]
    assert failed
    assert all(row["dropped"] and "nobody knows" in row["error"] and row["prompt"]["fields"]["answer"] == "3" for row in failed)
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    assert cli.main(["inspect", root, "--status", "failed", "--limit", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5  # header, two of them, that there are more, what the journal holds
    assert "nobody knows" in said[1]
    assert said[-1].startswith("4 steps committed, ")


def done_run_reader(run: LocalRun) -> JournalReader:
    return JournalReader(run.run.journal)


def test_tokens_of_a_real_run_read_as_its_text(done_run: LocalRun, capsys: pytest.CaptureFixture[str]):
    root = str(done_run.run.root)
    assert cli.main(["inspect", root, "--trajectory", "0/1", "--tokens", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    trajectory = done_run_reader(done_run).group(0).trajectories[1]
    rows = shown["token_rows"]
    assert [row["token"] for row in rows] == trajectory.tokens_T.tolist()
    assert "".join(row["text"] for row in rows if row["version"] is None).endswith("assistant\n")
    sampled = trajectory.versions_T != NO_VERSION
    np.testing.assert_allclose([r["logprob"] for r in rows if r["version"] is not None], trajectory.logprobs_T[sampled])
    assert cli.main(["inspect", root, "--trajectory", "0/1", "--tokens"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(rows) + 2
    assert table[-1].split()[:3] == [str(len(rows) - 1), str(rows[-1]["token"]), f"{rows[-1]['logprob']:.4f}"]


def test_a_group_side_by_side_and_a_conversation(done_run: LocalRun, capsys: pytest.CaptureFixture[str]):
    root = str(done_run.run.root)
    assert cli.main(["inspect", root, "--group", "0"]) == 0
    said = capsys.readouterr().out
    group = done_run_reader(done_run).group(0)
    assert said.startswith(f"group 0, prompt {group.prompt.id}, step 1\n[user]\n  {group.prompt.messages[0].content}\n")
    assert all(f"0/{m}  reward " in said for m in range(4))
    assert cli.main(["inspect", root, "--trajectory", "0/2"]) == 0
    said = capsys.readouterr().out
    one = group.trajectories[2]
    assert (
        f"trajectory 0/2, step 1, {one.status}, reward {one.reward:.3f}, {one.generated_tokens} generated tokens, seed {one.seed}" in said
    )
    assert "\n[assistant]\n" in said


def test_branches_are_shown_behind_the_conversation(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "run"
    shutil.copytree(done_run.run.root, copy, ignore=shutil.ignore_patterns("journal", "checkpoints"))
    Journal.create(copy / "journal", done_run.run.run_id).append_group(0, encode_group(two()))
    assert cli.main(["inspect", str(copy), "--trajectory", "0/0"]) == 0
    said = capsys.readouterr().out
    assert "6 generated tokens" in said
    shown = "[assistant]\n  say ..xx\nbranch 1 of 2, 4 tokens\n[user]\n  ask ...x\n[assistant]\n  say ...x\nbranch 2 of 2, 4 tokens\n[user]"
    assert shown in said
    assert cli.main(["inspect", str(copy), "--trajectory", "0/0", "--tokens"]) == 0
    assert "\nbranch 2 of 2, 4 tokens\nplace " in capsys.readouterr().out
    assert cli.main(["inspect", str(copy), "--trajectory", "0/0", "--tokens", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["token"] for row in told["token_rows"]] == [3, 4, 5, 6]
    assert [[row["token"] for row in branch["token_rows"]] for branch in told["branches"]] == [[13, 14, 15, 16], [23, 24, 25, 26]]
    assert cli.main(["inspect", str(copy), "--group", "0"]) == 0
    assert "6 tokens, -1.667, 2 branches" in capsys.readouterr().out


def test_without_its_model_tokens_are_shown_as_numbers(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "run"
    shutil.copytree(done_run.run.root, copy, ignore=shutil.ignore_patterns("final", "checkpoints"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text("\n".join("  path: /gone" if "tiny" in line else line for line in text.splitlines()))
    assert cli.main(["inspect", str(copy), "--trajectory", "0/1", "--tokens"]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("  ?")


def test_wrong_use_says_what_is_right(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(done_run.run.root), "--tokens"]) == 1
    assert "--tokens needs --trajectory ID" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "not a run" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", "r", "--reward", "high"])
    assert "invalid float range value: 'high'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", "r", "--limit", "-3"])
    assert "'-3' is no whole number from 0 on" in capsys.readouterr().err
    assert cli._parse(["inspect", "r", "--reward=-1:0"]).reward == (-1.0, 0.0)
