"""What a sandbox keeps code from, and how each way to end is told. Nothing that code starts is there afterwards."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import lives
from verst.errors import EnvironmentFailure
from verst.rollout import sandbox
from verst.rollout.sandbox import Limits, Outcome, Sandbox, refusal

LIMITS = Limits(timeout_s=20, memory_mb=512, disk_mb=8, processes=8, output_bytes=2000)


@pytest.fixture(params=["isolated", "not isolated"])
def box(request: pytest.FixtureRequest) -> Sandbox:
    if request.param == "isolated" and refusal() is not None:
        pytest.skip(f"no isolation on this machine: {refusal()}")
    return Sandbox(LIMITS, isolated=request.param == "isolated")


@pytest.fixture
def isolated() -> Sandbox:
    if refusal() is not None:
        pytest.skip(f"no isolation on this machine: {refusal()}")
    return Sandbox(LIMITS)


def quick(box: Sandbox, timeout_s: float = 1.5) -> Sandbox:
    return Sandbox(Limits(timeout_s=timeout_s, processes=8), isolated=box._isolated)


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def _leaves_nothing():
    before, directories = descendants(), set(Path(sandbox.tempfile.gettempdir()).glob("verst-tool-*"))
    yield
    assert descendants() <= before
    assert set(Path(sandbox.tempfile.gettempdir()).glob("verst-tool-*")) <= directories


async def test_output_and_exit_code_are_told(box: Sandbox):
    assert await box.run("import sys\nprint('é')\nprint('b', file=sys.stderr)") == Outcome("é\nb\n", cut=False, exit_code=0)
    assert await box.run("raise SystemExit(3)") == Outcome("", cut=False, exit_code=3)
    assert await box.run("import os; os.abort()") == Outcome("", cut=False, signal="SIGABRT")
    failed = await box.run("print(input())")  # there is nobody to ask
    assert failed.exit_code == 1
    assert failed.output.endswith("EOFError: EOF when reading a line\n")
    assert "SyntaxError" in (await box.run("\ud800\0")).output


async def test_code_that_hangs_is_ended_with_what_it_said(box: Sandbox):
    started = time.perf_counter()
    outcome = await quick(box).run("import time\nprint('so far')\ntime.sleep(100)")
    assert outcome == Outcome("so far\n", cut=False, timed_out=True)
    assert time.perf_counter() - started < 15


async def test_a_gigabyte_is_neither_kept_nor_read(box: Sandbox):
    outcome = await box.run("for _ in range(1000): print('x' * 10**6)")
    assert outcome == Outcome("x" * 2000, cut=True, flooded=True)
    assert await box.run("print('x' * 3000)") == Outcome("x" * 2000, cut=True, exit_code=0)


async def test_memory_is_limited(box: Sandbox):
    outcome = await box.run("x = bytearray(10**10)")
    assert outcome.exit_code == 1
    assert outcome.output.endswith("MemoryError\n")


async def test_a_large_file_is_not_written(box: Sandbox):
    outcome = await box.run("open('big', 'wb').write(bytes(20 * 2**20))")
    assert outcome.exit_code == 1
    assert "OSError" in outcome.output


async def test_many_files_together_are_limited_too(isolated: Sandbox):
    outcome = await isolated.run("for n in range(4): open(f'f{n}', 'wb').write(bytes(3 * 2**20))")
    assert "No space left on device" in outcome.output


async def test_forks_are_limited_and_end_with_the_code(isolated: Sandbox):
    code = "import os, time\nn = 0\ntry:\n  while n < 500:\n    if not os.fork(): os.setsid(); time.sleep(1000)\n    n += 1\n"
    outcome = await isolated.run(code + "except BlockingIOError: print(n)")
    assert outcome.exit_code == 0
    assert 5 <= int(outcome.output) <= 7  # where this is not root, processes of the sandbox itself count


async def test_a_child_that_keeps_the_output_open_ends_with_the_code(box: Sandbox):
    started = time.perf_counter()
    outcome = await box.run("import os, time\nif not os.fork(): time.sleep(1000)\nprint('over')")
    assert outcome == Outcome("over\n", cut=False, exit_code=0)
    assert time.perf_counter() - started < 15


async def test_code_that_kills_its_parent_does_not_get_away(box: Sandbox):
    outcome = await quick(box).run("import os, signal, time\nos.kill(os.getppid(), 9)\nprint('here')\ntime.sleep(1000)")
    assert not outcome.ok  # refused, ignored, or the end of both: as root or not, isolated or not


def test_the_death_of_the_run_ends_the_code(box: Sandbox, tmp_path: Path):
    code = f"""
import asyncio
from verst.rollout.sandbox import Sandbox
asyncio.run(Sandbox(isolated={box._isolated}).run("import time; time.sleep(1000)"))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ | {"TMPDIR": str(tmp_path)}) as run:
        started: list[int] = []
        wanted = 3 if box._isolated else 2  # the launcher, process 1 of the namespace, and the code
        deadline = time.monotonic() + 30
        while len(started) < wanted and time.monotonic() < deadline:
            time.sleep(0.05)
            started = [child.pid for child in psutil.Process(run.pid).children(recursive=True)]
        time.sleep(0.2)
        run.kill()
    deadline = time.monotonic() + 10
    while any(map(lives, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(started) == wanted
    assert not any(map(lives, started))


async def test_the_code_sees_neither_network_nor_processes_nor_files(isolated: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "secret")
    outcome = await isolated.run("import os; print(sorted(os.environ), os.listdir('/proc'), os.listdir('/tmp'), os.getpid())")
    names = ["HOME", "LANG", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH"]
    assert outcome.output == f"{names} [] ['main.py'] 2\n"
    outcome = await isolated.run("import socket; socket.create_connection(('192.0.2.1', 80), 5)")
    assert "Network is unreachable" in outcome.output
    outcome = await isolated.run(f"import os; print(os.path.exists({__file__!r})); open('/usr/x', 'w')")
    assert outcome.output.startswith("False\n")
    assert "Read-only file system" in outcome.output


async def test_what_covers_the_files_cannot_be_taken_off(isolated: Sandbox):
    call = "import ctypes\nc = ctypes.CDLL(None)\nprint(c.umount(b'/proc'), c.unshare(0x10020000), c.umount(b'/proc'))"
    said = (await isolated.run(call)).output.split()
    assert (said[0], said[2]) == ("-1", "-1")


async def test_packages_of_this_python_are_there(box: Sandbox):
    assert (await box.run("import numpy; print(numpy.arange(3).sum())")).output == "3\n"


async def test_a_cancelled_call_leaves_nothing(box: Sandbox):
    before = descendants()  # such as the fork server of other tests
    running = asyncio.create_task(box.run("import time; time.sleep(1000)"))
    await asyncio.sleep(0.3)
    assert descendants() - before
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await box.close()
    assert not descendants() - before


async def test_a_sandbox_that_cannot_be_made_is_no_fault_of_the_code(isolated: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_WRITABLE", ("/nowhere",))
    with pytest.raises(EnvironmentFailure, match="the sandbox could not be made: mount of /nowhere: No such file or directory"):
        await isolated.run("print(1)")
    assert refusal.__wrapped__() == "mount of /nowhere: No such file or directory"
    monkeypatch.setattr(sandbox.sys, "platform", "plan9")
    assert refusal.__wrapped__() == "namespaces are Linux's, and this is plan9"


@pytest.mark.parametrize(("field", "value"), [("timeout_s", 0), ("memory_mb", -1), ("processes", True), ("disk_mb", "8")])
def test_limits_are_positive_numbers(field: str, value: object):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; it must be a number above 0"):
        Limits(**{field: value})  # pyright: ignore[reportArgumentType]


def test_the_working_directory_is_hidden_unless_the_system_lies_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert os.path.realpath(tmp_path) in sandbox._hidden()
    for system in ("/", "/usr"):
        monkeypatch.chdir(system)
        assert system not in sandbox._hidden()


async def test_the_data_of_the_run_are_hidden_wherever_they_lie(isolated: Sandbox, monkeypatch: pytest.MonkeyPatch):
    file, directory = "/etc/passwd", "/usr/share"
    code = f"import os; print(os.path.getsize({file!r}), len(open({file!r}).read()), len(os.listdir({directory!r})))"
    assert "0" not in (await isolated.run(code)).output.split()
    monkeypatch.setattr(sandbox, "_ANSWERS", set())
    sandbox.hide([file, directory, "/not/there"])
    assert (await isolated.run(code)).output == "0 0 0\n"


async def test_packages_are_found_where_the_way_to_python_is_covered(isolated: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "venv").symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / Path(sys.executable).relative_to(sys.prefix)))
    outcome = await isolated.run("import numpy; print(numpy.arange(3).sum())")
    assert (outcome.output, outcome.exit_code) == ("3\n", 0)
