"""Starting and watching runs: what `verst train`, `verst resume`, `verst.train` and `verst.resume` have in common.

The run lives in an actor; this side starts Ray if nobody has, shows the run's lines, and passes on signals. On a laptop it owns the Ray
head and ends it with the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from verst.config.load import load_config
from verst.config.schema import Config
from verst.journal.lock import RunLock
from verst.runtime.extensions import Extensions
from verst.runtime.rundir import RunDirectory

Echo = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """A run that ended: where it lies, its metric rows (`kind` "step" or "evaluation"), and whether it was stopped early by a signal."""

    path: Path
    rows: list[dict[str, Any]]
    interrupted: bool

    @property
    def model(self) -> Path:
        """The trained model as a Hugging Face directory."""
        return self.path / "final"


def train(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    overrides: Sequence[str] = (),
    reward: Any = None,
    environment: Any = None,
    prompts: Any = None,
    echo: Echo | None = None,
) -> RunResult:
    """Trains a new run and waits for its end; the same as `verst train FILE`.

    Args:
        config: a run file, its values as a mapping, or a validated `Config`.
        reward: `fn(trajectory, fields) -> number`, plain or async, in place of `reward.function`.
        environment: an Environment class, in place of `rollout.environment`.
        prompts: rows (mappings) in place of `data.path` or `data.task`: a list, or a function that returns an iterator.
        echo: called with each line of progress; default: standard error.

    Raises:
        VerstError: anything wrong with input or run, as a message for a person.
    """
    resolved = config if isinstance(config, Config) else load_config(config, overrides)
    extensions = Extensions(reward, environment, prompts)
    packed = extensions.pack()
    from verst.runtime.preflight import preflight

    echo = echo or _to_stderr
    found = preflight(resolved, extensions)
    for warning in found.warnings:
        echo(f"warning: {warning}")
    run = RunDirectory.create(resolved, packed, found.stream)
    return _supervise(run, resolved.run.steps, echo)


def resume(path: str | Path, *, echo: Echo | None = None) -> RunResult:
    """Continues a run from its last checkpoint and its journal; the same as `verst resume RUN`.

    Raises:
        RunLocked: the run is still alive.
    """
    run, config = RunDirectory.open(path)
    return _supervise(run, config.run.steps, echo or _to_stderr)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _supervise(run: RunDirectory, steps: int, echo: Echo) -> RunResult:
    """Runs the service in an actor until it ends."""
    with RunLock(run.root):
        pass  # fails at once, before Ray is started, if the run is alive
    from verst.observe.sinks import read_rows

    with _ray(run, echo), _signals(run, echo) as stopping:
        from verst.runtime.actors import spawn
        from verst.runtime.service import RunService, worker_env

        echo(f"run {run.root}")
        service = spawn("loop", RunService, str(run.root), env=worker_env(1, run.module_path))
        _watch(service.handle, stopping, echo)
    rows = read_rows(run.metrics)
    done = any(row["kind"] == "step" and row["step"] == steps for row in rows)
    return RunResult(run.root, rows, interrupted=stopping.is_set() and not done)


def _watch(handle: Any, stopping: threading.Event, echo: Echo) -> None:
    """Shows the run's lines until it ends; raises what it raised."""
    import ray
    from ray.exceptions import GetTimeoutError

    from verst.runtime.actors import unwrapped

    running = handle.call.remote("run")
    seen, told = 0, False
    while True:
        ended = bool(ray.wait([running], timeout=0)[0])
        with unwrapped("loop", "watching"):
            try:
                seen, lines = ray.get(handle.call.remote("lines", seen, 0.0 if ended else 0.5), timeout=60)
            except GetTimeoutError:
                continue  # busy, not dead: a dead one raises at once
        for line in lines:
            echo(line)
        if ended and not lines:
            break
        if stopping.is_set() and not told:
            told = True
            handle.call.remote("stop")
    with unwrapped("loop", "run"):
        ray.get(running, timeout=60)


@contextlib.contextmanager
def _ray(run: RunDirectory, echo: Echo) -> Iterator[None]:
    """Ray, started here unless the caller has started it; then it is also ended here."""
    try:
        started = _start_ray(run, echo)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted before the run began; start it with: verst resume {run.root}") from None
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()


def _start_ray(run: RunDirectory, echo: Echo) -> bool:
    """Whether Ray was started here. Its processes live in the directory the run began in, where its modules are found."""
    # Ray's usage statistics would reach for the network, and its banners would drown the run's own lines
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    # Ray guards its ports with a token of its own making, and says so each time
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)

    if ray.is_initialized():
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with _began_in(run, echo):
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=min(2 << 30, memory // 4),
        )
    return True


def _began_in(run: RunDirectory, echo: Echo) -> contextlib.AbstractContextManager[None]:
    if run.cwd.is_dir():
        return contextlib.chdir(run.cwd)
    echo(f"warning: the run began in {run.cwd}, which is gone: its modules are looked for in {Path.cwd()} and on PYTHONPATH")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _signals(run: RunDirectory, echo: Echo) -> Iterator[threading.Event]:
    """The event is set by the first Ctrl-C or SIGTERM: the run ends at a consistent point. The second one ends it at once."""
    stopping = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt(f"ended at once by a second signal; continue from the last commit with: verst resume {run.root}")
        stopping.set()
        echo(f"{signal.Signals(number).name}: ending after the step in progress; once more to end at once (nothing committed is lost)")

    if threading.current_thread() is not threading.main_thread():
        yield stopping  # Python delivers signals to the main thread only; its owner decides there
        return
    former = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
