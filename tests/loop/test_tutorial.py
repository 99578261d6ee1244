"""`docs/tutorial.md` does what it says: its files are written and its commands run in order, and they print what the page shows.

In this process and without Ray, whose start takes longer than what the commands do; `test_cluster.py` and `test_kill.py` have it.
"""

from __future__ import annotations

import asyncio
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import local_spawn
from verst import cli
from verst.observe.sinks import read_rows
from verst.recipes.tiny import build_tiny_model
from verst.runtime import launch
from verst.runtime.rundir import RunDirectory
from verst.runtime.service import RunService

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```([^\n]*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
LEFT_OUT = "[…]"


def in_this_process(run: RunDirectory, steps: int, address: str | None, echo: Any, *, live: bool) -> launch.RunResult:
    """In place of `launch._supervise`, which starts Ray."""
    echo(f"run {run.root}")
    service = RunService(str(run.root), local_spawn)

    async def lines() -> list[str]:
        await service.run()
        return (await service.lines(0, 0))[1]

    for line in asyncio.run(lines()):
        echo(line)
    return launch.RunResult(run.root, read_rows(run.metrics), interrupted=False)


def shape(text: str, directory: Path) -> str:
    """A line without what differs between machines: figures, the phases that took longest, and where the directory is."""
    text = text.replace(f"{directory}/", "")
    text = re.sub(r"(  tok/s [\d,]+)?  \d+\.\d+ s \(.*\)$", "", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "HASH", text)
    return re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?", "#", " ".join(text.split()))


def run_command(command: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What it printed. Commands of Verst and Python scripts run here, where PyTorch is loaded already."""
    words = shlex.split(command)
    if words[0] == "verst":
        assert cli.main(words[1:]) == 0
    elif words[0] == "python":
        runpy.run_path(str(directory / words[1]), run_name="__main__")
    else:
        return subprocess.run(words, cwd=directory, capture_output=True, text=True, check=True, timeout=60).stdout
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_one_thread")
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_supervise", in_this_process)
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parents[1]))  # `verst eval` adds to both
    monkeypatch.setattr(sys, "path", list(sys.path))
    build_tiny_model("runs/quickstart/model")  # all that the quickstart leaves and the tutorial uses
    ran = 0
    for kind, body in BLOCKS:
        title = re.fullmatch(r'python title="(.+)"', kind)
        if title:
            (tmp_path / title[1]).write_text(body, encoding="utf-8")
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", body if kind == "console" else "", re.MULTILINE):
            printed = [shape(line, tmp_path) for line in run_command(command, tmp_path, capsys).splitlines()]
            ran += 1
            for line in filter(None, shown.splitlines()):
                said = f"$ {command}\ndid not print: {line}\nbut:\n" + "\n".join(printed)
                assert line == LEFT_OUT or shape(line, tmp_path) in printed, said
    assert ran == len(re.findall(r"^\$ ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) >= 15
    rows = read_rows(tmp_path / "runs/pens/metrics.jsonl")
    rewards = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert rewards[-1] > rewards[0] + 0.05  # it learned, as the page says
