"""`verst profile`: a journaled step trained again is the step that happened, and the trace shows its parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.loop.local import LocalRun
from verst import cli
from verst.errors import ConfigError, JournalError
from verst.runtime.profiling import profile_step


def files_of(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("step", "restored"), [(2, "the initial model"), (3, "the checkpoint of step 2")])
def test_a_step_is_trained_again_to_the_committed_weights(done_run: LocalRun, tmp_path: Path, step: int, restored: str):
    before = files_of(done_run.run.root)
    found = profile_step(done_run.run.root, step, tmp_path / "out", device="cpu")
    assert (found.begun_from, found.same_weights, found.memory) == (restored, True, None)
    events = json.loads(found.trace.read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert [names.count(f"verst/{phase}") for phase in ("load", "forward_backward", "optimizer")] == [1, 1, 1]
    assert {"aten::mm", "aten::_softmax"} & set(names) or "aten::addmm" in names
    assert set(found.phases_s) == {"load", "forward_backward", "optimizer"}
    assert [o.self_s for o in found.operators] == sorted((o.self_s for o in found.operators), reverse=True)
    assert sum(o.calls for o in found.operators) > 100
    assert found.operators_file.read_text().splitlines()[1].endswith(found.operators[0].name)
    assert files_of(done_run.run.root) == before


def test_other_numbers_than_committed_are_told(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "run"
    shutil.copytree(done_run.run.root, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002"))
    assert cli.main(["profile", str(copy), "--step", "4", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 4, trained again from the checkpoint of step 2; weights NOT as committed")
    assert said[-2].startswith(f"wrote {tmp_path / 'out' / 'trace.json'}")
    assert said[-1].startswith("no memory snapshot")


def test_what_cannot_be_profiled_says_why_and_what_to_do(done_run: LocalRun, tmp_path: Path):
    with pytest.raises(JournalError, match="no batch of step 5; it has those of steps 1 to 4"):
        profile_step(done_run.run.root, 5, tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="exists already"):
        profile_step(done_run.run.root, 2, tmp_path, device="cpu")
    copy = tmp_path / "run"
    shutil.copytree(done_run.run.root, copy)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("ranks: 1", "ranks: 2"))
    with pytest.raises(ConfigError, match=r"train.ranks 2: .*verst resume COPY train.ranks=1"):
        profile_step(copy, 2, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
