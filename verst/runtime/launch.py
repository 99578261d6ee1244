"""Starting and watching runs: what `verst train`, `verst resume`, `verst.train` and `verst.resume` have in common.

The run lives in an actor; this side starts Ray if nobody has, shows the run's lines, and passes on signals. On a laptop it owns the Ray
head and ends it with the run. On a cluster (`address`) the run needs nobody to watch it: a closed terminal changes nothing, and `resume` of
a run that still lives there takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import ConfigError, ExtensionError, ModelError
from verst.journal.lock import RunLock
from verst.runtime.attend import signals, watch_over, while_open
from verst.runtime.branch import create_run, open_branch
from verst.runtime.extensions import Extensions
from verst.runtime.rundir import RunDirectory
from verst.runtime.shown import Echo, shown


@dataclass(frozen=True)
class RunResult:
    """A run that ended: where it lies, its metric rows (`kind` "step" or "evaluation"), and whether it was stopped early by a signal.

    `detached`: it has not ended; the terminal was closed, and the run goes on on its cluster.
    """

    path: Path
    rows: list[dict[str, Any]]
    interrupted: bool
    detached: bool = False

    @property
    def model(self) -> Path:
        """The trained model as a Hugging Face directory."""
        return self.path / "final"


def train(  # noqa: PLR0913 - each is a choice of the caller
    config: str | Path | Mapping[str, Any] | Config,
    *,
    overrides: Sequence[str] = (),
    reward: Any = None,
    environment: Any = None,
    prompts: Any = None,
    address: str | None = None,
    begin_from: str | None = None,
    echo: Echo | None = None,
    live: bool = False,
) -> RunResult:
    """Trains a new run and waits for its end; the same as `verst train FILE`.

    Args:
        config: a run file, its values as a mapping, or a validated `Config`.
        reward: `fn(trajectory, fields) -> number`, plain or async, in place of `reward.function`.
        environment: an Environment class, in place of `rollout.environment`.
        prompts: rows (mappings) in place of `data.path`, `data.dataset` or `data.task`: a list, or a function that returns an iterator.
        address: HOST:PORT of the Ray cluster to run on, or "auto" for the one this machine belongs to; run.dir must be on a disk that all
            its nodes share. Default: a Ray of the run's own, on this machine, which ends with it.
        begin_from: "RUN" or "RUN@STEP", a checkpoint of another run of the same model to begin from (`verst.runtime.branch`).
        echo: called with each line of progress; default: standard error.
        live: show a live view in place of the lines, if standard output is a terminal that can show one.

    Raises:
        VerstError: anything wrong with input, cluster or run, as a message for a person.
    """
    resolved = config if isinstance(config, Config) else load_config(config, overrides)
    extensions = Extensions(reward, environment, prompts)
    packed = extensions.pack()
    from verst.runtime.preflight import preflight

    echo = echo or to_stderr
    found = preflight(resolved, extensions)
    branch = None if begin_from is None else open_branch(begin_from, resolved)
    for warning in found.warnings:
        echo(f"warning: {warning}")
    with contextlib.ExitStack() as opened:
        if address is not None:
            connect(address, opened)  # before there is a directory that a wrong address would leave behind
        run = create_run(resolved, packed, found.stream, branch)
        if branch is not None:
            echo(branch.line(found.stream))
        try:
            return _supervise(run, resolved, address, echo, live=live)
        except (ConfigError, ExtensionError, ModelError):
            run.discard_unbegun()
            raise


def resume(
    path: str | Path, *, overrides: Sequence[str] = (), address: str | None = None, echo: Echo | None = None, live: bool = False
) -> RunResult:
    """Continues a run from its last checkpoint and its journal; the same as `verst resume RUN`.

    Args:
        overrides: options to change from here on, such as `train.ranks=2`; only those that do not change what is learned
            (`verst.runtime.changes`).
        address: see `train`. If the run still lives there, this follows it as the process that began it did.
        live: see `train`.

    Raises:
        RunLocked: the run is still alive, and not on the cluster of `address`.
        ConfigError: an override names an option that must stay as it is.
    """
    run, config = RunDirectory.open(path)
    echo = echo or to_stderr
    with contextlib.ExitStack() as opened:
        if address is not None:
            connect(address, opened)
        if overrides:
            from verst.runtime.changes import change

            config = change(run, config, overrides, echo)
        return _supervise(run, config, address, echo, live=live)


def connect(address: str, opened: contextlib.ExitStack) -> None:
    """Connects to the cluster for as long as `opened` is, unless the caller is connected already."""
    _quiet_ray()
    import ray

    from verst.runtime import cluster

    if not ray.is_initialized():
        opened.callback(ray.shutdown)
    cluster.connect(address)


def to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _supervise(run: RunDirectory, config: Config, address: str | None, echo: Echo, *, live: bool) -> RunResult:
    """Runs the loop in an actor until it ends, or until the terminal is closed on one that lives on a cluster."""
    from verst.observe.sinks import read_rows

    env, steps = worker_env(config.train.threads, run.module_path), config.run.steps
    with (
        _ray(run, address, env, echo) as has_env,
        signals(run, leaves=address is not None) as asked,
        shown(run, steps, echo, live=live) as tell,
    ):
        if address is not None:
            tell = while_open(tell, asked)
        import ray

        from verst.runtime.actors import WorkerDied
        from verst.runtime.kept import end_all

        handle = _loop(run, address, {} if has_env else env, tell)
        try:
            watch_over(handle, asked, tell)
        except (KeyboardInterrupt, WorkerDied) as error:
            if address is None or isinstance(error, KeyboardInterrupt):  # else Ray goes on starting it, and nobody has to watch
                ray.kill(handle)
                end_all(run.run_id)
            raise
    rows = read_rows(run.metrics) if run.metrics.exists() else []
    done = any(row["kind"] == "step" and row["step"] == steps for row in rows)
    left = asked.leave.is_set()
    return RunResult(run.root, rows, interrupted=asked.stop.is_set() and not done and not left, detached=left)


def worker_env(threads: int, module_path: Sequence[str]) -> dict[str, str]:
    """Environment of a run's processes: CPU threads (fixed, because they are part of what makes bits repeat), and the user's modules."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",  # some reasoning-gym tasks make their rows by iterating over sets of strings
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes cuBLAS repeat its sums; read once, when CUDA starts
        # NCCL waits for ever if the members of a group differ in this, and SGLang sets it so in its servers
        "NCCL_CUMEM_ENABLE": os.environ.get("NCCL_CUMEM_ENABLE", "0"),
        "PYTHONPATH": os.pathsep.join(module_path),
    }


def _loop(run: RunDirectory, address: str | None, env: Mapping[str, str], echo: Echo) -> Any:
    """The run's loop as an actor handle: a new one, or the one that lives on the cluster already."""
    if address is None:
        from verst.runtime.actors import spawn
        from verst.runtime.service import RunService

        echo(f"run {run.root}")
        return spawn("loop", RunService, str(run.root), env=env, max_restarts=-1).handle
    from verst.runtime import cluster

    handle = cluster.loop_of(run)
    echo(f"run {run.root} {'lives' if handle else 'begins'} on the Ray cluster at {address}, and goes on when this terminal is closed")
    echo(f"look again with: verst watch {run.root}; take it up, to end it with Ctrl-C: verst resume {run.root} --address {address}")
    if handle is None:
        _require_unlocked(run)
        handle = cluster.begin_loop(run, env)
    return handle


def _require_unlocked(run: RunDirectory) -> None:
    """Raises `RunLocked` at once, before anything is started, if the run is alive."""
    with RunLock(run.root):
        pass


@contextlib.contextmanager
def _ray(run: RunDirectory, address: str | None, env: Mapping[str, str], echo: Echo) -> Iterator[bool]:
    """Ray, started here unless there is a cluster or the caller has started it; then it is also ended here.

    Yields whether its processes have the variables `env`.
    """
    if address is not None:
        yield False
        return
    _require_unlocked(run)
    try:
        started = start_ray(run, env, echo)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted before the run began; start it with: verst resume {run.root}") from None
    try:
        yield started
    finally:
        if started:
            import ray

            ray.shutdown()


def start_ray(run: RunDirectory, env: Mapping[str, str], echo: Echo) -> bool:
    """Whether Ray was started here. Its processes live in the directory the run began in, where its modules are found, and inherit `env`:
    for an actor with an environment of its own Ray would first ask an agent, and then start and import itself twice.
    """
    _quiet_ray()
    import ray

    if ray.is_initialized():
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with _began_in(run, echo), _environment(env):
        ray.init(
            address="local",  # RAY_ADDRESS may name a cluster; runs go there by `address` only
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=min(2 << 30, memory // 4),
        )
    return True


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _quiet_ray() -> None:
    # Ray's usage statistics would reach for the network, and its banners would drown the run's own lines
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray guards its ports with a token of its own making, and says so each time
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def _began_in(run: RunDirectory, echo: Echo) -> contextlib.AbstractContextManager[None]:
    if run.cwd.is_dir():
        return contextlib.chdir(run.cwd)
    echo(f"warning: the run began in {run.cwd}, which is gone: its modules are looked for in {Path.cwd()} and on PYTHONPATH")
    return contextlib.nullcontext()
