"""`verst doctor`: the matrix is that of the requirements, and each problem is found and told with what to do."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from tests.unit.test_startup import loaded_by
from verst import cli
from verst.doctor import Examination, examine, gpus, machine, network, packages
from verst.doctor.findings import Finding
from verst.doctor.packages import version_sets

ROOT = Path(__file__).parents[2]


def pins(*files: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for file in files for line in (ROOT / file).read_text().splitlines()]
    return {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def test_the_matrix_is_that_of_the_requirements():
    cpu = next(s for s in version_sets() if s.name == "cpu")
    core, pair = pins("requirements.txt"), pins("requirements-stack.txt")
    assert {n.lower(): v for n, v in cpu.packages["core"].items()} == {n.lower(): core[n.lower()] for n in cpu.packages["core"]}
    for group in ("sglang", "megatron"):
        assert cpu.packages[group] == {name: pair[name] for name in cpu.packages[group]}
    assert set(cpu.packages["core"]) == set(version_sets()[1].packages["core"])


def test_core_is_what_the_package_requires():
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {line.split(">")[0].lower().replace("_", "-") for line in declared}
    assert {name.lower() for name in version_sets()[0].packages["core"]} == names


def test_this_machine_is_examined_in_time_and_nothing_is_lacking(capsys: pytest.CaptureFixture[str]):
    begun = time.monotonic()
    assert cli.main(["doctor"]) == 0
    assert time.monotonic() - begun < 5
    said = capsys.readouterr().out
    assert said.startswith("compared with the set ")
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("pydantic ")] == ["ok"]


def test_none_of_the_packages_is_imported():
    heavy = {"torch", "ray", "sglang", "megatron", "transformers", "pydantic", "numpy"}
    assert not loaded_by("from verst.doctor import examine; examine()") & heavy


def test_what_is_missing_or_other_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    have = {"torch": "2.13.0", "transformers": "5.0.0", "sglang": None, "ray": None}
    monkeypatch.setattr(packages, "installed", lambda name: have.get(name, "1"))
    rows = {row.what: row for row in packages.package_findings(version_sets()[0])}
    assert rows["torch"] == Finding("torch", "2.13.0", "2.13.0", "ok")
    assert rows["transformers"].verdict == "other"
    assert rows["transformers"].advice.endswith("pip install transformers==5.12.1")
    assert (rows["sglang"].verdict, rows["sglang"].advice) == ("absent", "only for rollout.engine sglang: make stack")
    assert (rows["ray"].verdict, rows["ray"].advice) == ("LACKING", "pip install -r requirements.txt")


def test_a_local_label_is_no_other_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "version", lambda name: "2.11.0+cu130")
    assert packages.installed("torch") == "2.11.0"


def with_nvidia_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


TWO = """case "$1" in
--query*) echo "NVIDIA H100 80GB HBM3, 81559, 580.159.04"; echo "NVIDIA H100 80GB HBM3, 81559, 580.159.04";;
*) echo "| NVIDIA-SMI 580.159.04    Driver Version: 580.159.04    CUDA Version: 13.0 |";;
esac"""


def test_gpus_are_listed_and_compared_with_the_gpu_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_nvidia_smi(tmp_path, monkeypatch, TWO)
    monkeypatch.setattr(gpus, "_torch_cuda", lambda: "13.0")
    found = examine()
    assert found.nearest.gpu
    rows = {row.what: row for row in found.findings}
    assert rows["GPUs"].found == "2 x NVIDIA H100 80GB HBM3, 80 GiB"
    assert rows["CUDA"] == Finding("CUDA", "driver 580.159.04 (CUDA 13.0), torch's: 13.0", "", "ok")
    assert "RDMA devices" in rows


@pytest.mark.parametrize(("built", "advice"), [("", "torch is built without CUDA"), ("13.1", "torch needs CUDA 13.1: install a driver")])
def test_a_torch_that_cannot_use_the_gpu_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str, advice: str):
    with_nvidia_smi(tmp_path, monkeypatch, TWO)
    monkeypatch.setattr(gpus, "_torch_cuda", lambda: built)
    (row,) = [row for row in examine().lacking if row.what == "CUDA"]
    assert row.advice.startswith(advice)


def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_nvidia_smi(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(gpus, "_COMMAND_S", 0.2)
    assert gpus.list_gpus() == ([], "")
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path)
    (row,) = gpus.gpu_findings([], "")
    assert (row.found, row.verdict) == ("a driver, but none listed", "low")


def test_the_cuda_of_torch_is_read_from_its_file():
    import torch

    assert gpus._torch_cuda() == (torch.version.cuda or "")


def test_a_small_shared_memory_is_told():
    assert machine.room("/dev/shm", 1 << 26, 2 << 30, "enlarge it") == Finding("/dev/shm", "0.1 GiB free", "", "low", "enlarge it")
    assert machine.room("/dev/shm", 3 << 30, 2 << 30, "enlarge it").advice == ""


def test_a_slow_disk_and_one_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert machine.disk_speed(tmp_path / "nowhere").found == "not measured: No such file or directory"
    monkeypatch.setattr(machine, "_measured", lambda file: (20.0, 0.001))
    slow = machine.disk_speed(tmp_path)
    assert (slow.found, slow.verdict) == ("20 MiB/s written, fsync 1.0 ms", "low")
    assert "set run.dir to a local disk" in slow.advice
    monkeypatch.setattr(machine, "_measured", lambda file: (900.0, 0.2))
    assert machine.disk_speed(tmp_path).verdict == "low"


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path):
    with (tmp_path / "file").open("wb") as file:
        rate, sync_s = machine._measured(file.fileno())
    assert rate > 1
    assert 0 < sync_s < 1
    (tmp_path / "file").unlink()
    assert machine.disk_speed(tmp_path).what == "disk speed"
    assert not list(tmp_path.iterdir())


def test_limits_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine._cpu_quota() is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{3 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert machine._processors() == Finding("CPUs", "4, limited to the time of 1.5", "", "low", machine._processors().advice)
    memory = machine._memory()
    assert (memory.found, memory.verdict) == ("2.0 GiB free of 3.0 GiB", "low")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine._processors().verdict == "ok"


def test_locked_memory_matters_where_devices_read_by_themselves():
    assert machine.locked_memory(8 << 20, needed=False).verdict == "ok"
    low = machine.locked_memory(8 << 20, needed=True)
    assert (low.found, low.verdict) == ("8 MiB", "low")
    assert "ulimit -l unlimited" in low.advice
    assert machine.locked_memory(-1, needed=True) == Finding("locked memory", "unlimited", "", "ok")


def test_the_clock_is_asked_without_being_changed(monkeypatch: pytest.MonkeyPatch):
    state, error_s = machine.kernel_clock()
    assert state in (None, True, False)
    assert error_s >= 0
    monkeypatch.setattr(machine, "kernel_clock", lambda: (True, 0.004))
    assert machine._clock() == Finding("clock", "synchronised to 4 ms, steady against the monotonic clock", "", "ok")
    monkeypatch.setattr(machine, "kernel_clock", lambda: (False, 16.0))
    assert "chrony" in machine._clock().advice
    walls = iter([1000.0, 1001.0])
    monkeypatch.setattr(time, "time", lambda: next(walls))
    assert "jumped by " in machine._clock().found


def test_rdma_devices_are_told_with_the_state_of_their_ports(tmp_path: Path):
    assert network.rdma_devices(tmp_path).found == "none: NCCL and gloo use TCP between machines"
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        (tmp_path / name / "ports" / "1").mkdir(parents=True)
        (tmp_path / name / "ports" / "1" / "state").write_text(f"{state}\n")
    found = network.rdma_devices(tmp_path)
    assert (found.found, found.verdict) == ("mlx5_0 (ACTIVE), mlx5_1 (DOWN)", "low")
    assert found.advice.startswith("no port of mlx5_1 is active")


def test_few_free_ports_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "range").write_text("40000\t40999\n")
    header = "  sl  local_address rem_address   st\n"
    (tmp_path / "tcp").write_text(header + "   0: 0100007F:9C41 00000000:0000 0A\n   1: 0100007F:0016 00000000:0000 0A\n")
    monkeypatch.setattr(network, "_PORTS", tmp_path / "range")
    monkeypatch.setattr(network, "_TCP", (tmp_path / "tcp", tmp_path / "none"))
    found = network._ports()  # 0x9C41 is 40001; port 22 lies outside
    assert (found.found, found.verdict) == ("999 of 40000 to 40999", "low")


def test_the_same_for_programs(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in found["findings"]}
    assert found["lacking"] == 0
    assert rows["pydantic"]["verdict"] == "ok"
    assert {"memory", "disk speed", "open files", "locked memory", "clock", "free ports", "RDMA devices"} <= rows.keys()


def test_what_to_do_follows_the_table_once():
    rows = [Finding("a", "-", "1", "LACKING", "install a"), Finding("b", "2", "2", "ok"), Finding("a", "-", "1", "LACKING", "install a")]
    lines = Examination(version_sets()[0], rows).lines()
    assert lines[1:] == [
        "   found  tested",
        "a  -      1       LACKING",
        "b  2      2       ok",
        "a  -      1       LACKING",
        "to do:",
        "  a: install a",
    ]
