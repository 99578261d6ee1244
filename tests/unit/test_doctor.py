"""`verst doctor`: the matrix is that of the requirements, and each problem is found and told with what to do."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from tests.unit.test_startup import loaded_by
from verst import cli, doctor
from verst.doctor import Examination, Finding, examine, version_sets

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
    monkeypatch.setattr(doctor, "_installed", lambda name: have.get(name, "1"))
    rows = {row.what: row for row in doctor._packages(version_sets()[0])}
    assert rows["torch"] == Finding("torch", "2.13.0", "2.13.0", "ok")
    assert rows["transformers"].verdict == "other"
    assert rows["transformers"].advice.endswith("pip install transformers==5.12.1")
    assert (rows["sglang"].verdict, rows["sglang"].advice) == ("absent", "only for rollout.engine sglang: make stack")
    assert (rows["ray"].verdict, rows["ray"].advice) == ("LACKING", "pip install -r requirements.txt")


def test_a_local_label_is_no_other_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "version", lambda name: "2.11.0+cu130")
    assert doctor._installed("torch") == "2.11.0"


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
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "13.0")
    found = examine()
    assert found.nearest.gpu
    rows = {row.what: row for row in found.findings}
    assert rows["GPUs"].found == "2 x NVIDIA H100 80GB HBM3, 80 GiB"
    assert rows["CUDA"] == Finding("CUDA", "driver 580.159.04 (CUDA 13.0), torch's: 13.0", "", "ok")
    assert "RDMA devices" in rows


@pytest.mark.parametrize(("built", "advice"), [("", "torch is built without CUDA"), ("13.1", "torch needs CUDA 13.1: install a driver")])
def test_a_torch_that_cannot_use_the_gpu_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str, advice: str):
    with_nvidia_smi(tmp_path, monkeypatch, TWO)
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: built)
    (row,) = [row for row in examine().lacking if row.what == "CUDA"]
    assert row.advice.startswith(advice)


def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_nvidia_smi(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(doctor, "_COMMAND_S", 0.2)
    assert doctor._gpus() == ([], "")
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    (row,) = doctor._gpu_findings([], "")
    assert (row.found, row.verdict) == ("a driver, but none listed", "low")


def test_the_cuda_of_torch_is_read_from_its_file():
    import torch

    assert doctor._torch_cuda() == (torch.version.cuda or "")


def test_a_small_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch):
    assert doctor._room("/dev/shm", 1 << 26, 2 << 30, "enlarge it") == Finding("/dev/shm", "0.1 GiB free", "", "low", "enlarge it")
    assert doctor._room("/dev/shm", 3 << 30, 2 << 30, "enlarge it").advice == ""


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
