"""A Ray cluster that others run: reaching it within a deadline, and the loop that lives there without a terminal.

The loop is a detached actor with a name, so it outlives the process that began it; everything else of the run belongs to the loop and
ends with it. Whoever names the run on the same cluster later finds the actor again.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from verst.errors import ConfigError, RunLocked, VerstError
from verst.runtime.kept import NAMESPACE, restarted
from verst.runtime.rundir import RunDirectory
from verst.runtime.service import RunService

_REACH_S = 5.0
"""Limit of opening a connection to the head."""
_CONNECT_S = 40.0
"""Limit of Ray's own greeting after that, the start of the process that tries it included."""
_START_S = 120.0
"""Limit of the start of the loop's process."""
_ANSWER_S = 30.0
"""Limit of a loop's answer to whether it has ended."""
_FAREWELL_S = 10.0
"""How long a loop that ended still answers: those who watch ask twice a second."""
_TRY = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
print(ray.get_runtime_context().gcs_address)
"""


class ClusterUnreachable(VerstError):
    """There is no usable Ray cluster at the address given."""


def connect(address: str) -> str:
    """Connects this process to a cluster and returns its HOST:PORT. `address` is that, or "auto" for the one this machine belongs to.

    Ray itself would try for two minutes and then end the process; so another process tries first.

    Raises:
        ConfigError: the address is none, or this process is connected to another cluster already.
        ClusterUnreachable: nobody answers there, or not as this machine's Ray needs it.
    """
    import ray

    if ray.is_initialized():
        present = ray.get_runtime_context().gcs_address
        if address not in ("auto", present):
            raise ConfigError(f"address {address}: this process is connected to the cluster at {present} already: leave it out")
        return present
    if address != "auto":
        _reach(address)
    _show_token()
    found = _try(address)
    ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    return found


def _reach(address: str) -> None:
    """Opens a connection, so that a wrong address is told at once."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"address {address!r}: expected HOST:PORT of the head's GCS (as `ray start --head` prints it), or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"no Ray cluster at {address}: {error.strerror or error}. Is the head running (`ray status --address {address}`), "
            "and does this machine reach that port?"
        ) from error


def _show_token() -> None:
    """Lets Ray show the token that `ray start` has asked for, if this user has one: by itself it does so only where it starts a cluster."""
    try:
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    except ImportError:  # a Ray without tokens
        return
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _try(address: str) -> str:
    """Connects in a process of its own. Returns the cluster's HOST:PORT."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY, address], capture_output=True, text=True, timeout=_CONNECT_S, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise ClusterUnreachable(
            f"no Ray cluster at {address}: what listens there did not answer as Ray does within {_CONNECT_S:g} s. "
            "Give the port of the head's GCS (6379 unless it was chosen), not that of the dashboard or of Ray Client"
        ) from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        refused = "its token is not that of this user's ~/.ray/auth_token. " if "InvalidAuthToken" in done.stderr else ""
        raise ClusterUnreachable(
            f"the Ray cluster at {address} cannot be used from here: {refused}{said[-1]}. This machine must be a node of it "
            "(`ray start --address=HOST:PORT`), with the same versions of Ray and Python on all nodes"
        )
    return done.stdout.splitlines()[-1]


def loop_of(run: RunDirectory) -> Any | None:
    """The run's living loop on the cluster that this process is connected to, as an actor handle; None if there is none.

    Raises `ClusterUnreachable` if it does not answer.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        handle = ray.get_actor(_name(run), namespace=NAMESPACE)
        if not ray.get(handle.call.remote("over"), timeout=_ANSWER_S):
            return handle
        ray.kill(handle)  # it has ended and only answers those who still watch
        for _ in range(int(10 * _ANSWER_S)):
            ray.get_actor(_name(run), namespace=NAMESPACE)
            time.sleep(0.1)
    except (ValueError, RayActorError):  # there is none, or not any more
        return None
    except GetTimeoutError:
        pass
    raise ClusterUnreachable(f"the loop of {run.root} neither answered nor ended within {_ANSWER_S:g} s: is its node alive (`ray status`)?")


def begin_loop(run: RunDirectory, env: Mapping[str, str]) -> Any:
    """Starts the run's loop as a detached actor, on this machine if it can: here the run's directory is known to be.

    It has begun when this returns. Raises `RunLocked` if there is one already, `ClusterUnreachable` if no node starts it in time.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from verst.runtime.actors import spawn, unwrapped

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"name": _name(run), "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "scheduling_strategy": here}
    try:
        handle = spawn("loop", ClusterRun, str(run.root), env=env, **options).handle
    except ValueError as error:  # the name is taken
        raise RunLocked(f"{run.root}: another process has begun it on this cluster a moment ago; resume it again to follow it") from error
    try:
        with unwrapped("loop", "begin"):
            ray.get(handle.call.remote("begin"), timeout=_START_S)
    except GetTimeoutError:
        ray.kill(handle)
        raise ClusterUnreachable(f"no node of the cluster started the loop within {_START_S:g} s: see `ray status`") from None
    except BaseException:
        ray.kill(handle)
        raise
    return handle


def _name(run: RunDirectory) -> str:
    return f"loop {run.run_id}"


class ClusterRun(RunService):
    """A run that needs nobody to watch it: if its process dies, Ray starts another, which goes on. Its process ends soon after the run."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        if restarted():
            self._beginning = asyncio.get_running_loop().create_task(self.begin())

    async def over(self) -> bool:
        """Whether the run has ended, with or without an error."""
        return self._whole is not None and self._whole.done()

    async def _to_the_end(self) -> None:
        try:
            await super()._to_the_end()
        finally:
            asyncio.get_running_loop().call_later(_FAREWELL_S, _end_process)


def _end_process() -> None:
    import ray

    ray.kill(ray.get_runtime_context().current_actor)
