"""The thin Ray layer: one actor class for every role, and no logic.

A `Host` holds one plain object and calls its methods by name. Synchronous methods run one after another on a thread of their own, so that
the actor always answers; asynchronous ones run on the actor's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

from verst.errors import DeadlineExceeded, VerstError
from verst.observe.stacks import allow_dumps, described, machine, stacks
from verst.runtime.mailbox import Answer, Call, Inbox, Mailbox
from verst.runtime.wait import within

_CONCURRENT_CALLS = 10_000
"""Calls an actor holds at once: every group in flight is one."""

_STACKS_S = 5.0
_WHERE_S = 1.0
"""It is known already, unless the process has never answered."""


class Worker(Protocol):
    """A plain object in this process or in an actor, called by method name."""

    name: str

    async def call(self, method: str, /, *args: Any) -> Any:
        """One message there and one back."""
        ...

    async def post(self, method: str, /, *args: Any) -> Any:
        """The same for many small calls at a time, which share messages (`verst.runtime.mailbox`)."""
        ...

    async def node(self) -> str:
        """The machine that its process is on, by Ray's name for it."""
        ...

    async def where(self) -> Where:
        """Returns once its process runs. Raises `WorkerDied` if it ended before."""
        ...

    async def ping(self) -> None:
        """Returns as soon as its process answers, whatever it works on."""
        ...

    async def stacks(self) -> str:
        """What its process does, also if that does not answer: then as seen from outside. Returns within some 5 s and raises nothing."""
        ...

    def kill(self) -> None:
        """Ends the process, also one that does not answer any more."""
        ...


class Where(NamedTuple):
    """Where a process is. `machine`: see `verst.observe.stacks.machine`."""

    host: str
    pid: int
    machine: str


def is_actor() -> bool:
    """Whether this process is that of an actor, which holds one object and nothing of a test or a command."""
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


class WorkerDied(VerstError):
    """A process that Verst depends on ended. The message names its role."""


class Host:
    """A process of its own around one plain object."""

    def __init__(self, factory: Callable[..., Any], *args: Any) -> None:
        self._object = factory(*args)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verst-worker")
        self._inbox = Inbox(self.call)
        self._working: tuple[str, float] | None = None  # which method the thread is in, and since when
        allow_dumps()

    async def call(self, method: str, *args: Any) -> Any:
        function = getattr(self._object, method)
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, method, function, args)

    def _work(self, method: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._working = method, time.monotonic()
        try:
            return function(*args)
        finally:
            self._working = None

    async def where(self) -> Where:
        return Where(socket.gethostname(), os.getpid(), machine())

    async def stacks(self) -> str:
        """Answered while the thread works, or is stuck."""
        working = self._working
        doing = "waits for a call" if working is None else f"in {working[0]} for {time.monotonic() - working[1]:.1f} s"
        return f"process {os.getpid()} on {socket.gethostname()}, {doing}\n{stacks()}"

    async def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    async def submit(self, caller: int, calls: Sequence[Call]) -> None:
        self._inbox.submit(caller, calls)

    async def collect(self, caller: int, wait_s: float) -> list[Answer]:
        return await self._inbox.collect(caller, wait_s)


_HOST: Any = ray.remote(Host)


@contextlib.contextmanager
def unwrapped(name: str, method: str) -> Iterator[None]:
    """Lets a remote diagnosis through as itself, and gives the death of a process its role."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, VerstError):
            raise error.cause from error  # Ray's wrapper holds the remote traceback
        raise
    except RayActorError as error:
        raise WorkerDied(f"{name} died ({method}): {error}") from error
    except ActorUnschedulableError as error:  # the machine that it had to be on is lost
        raise WorkerDied(f"{name} could not be started ({method}): {error}") from error


class RayWorker:
    """A `Worker` in an actor."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle
        self._where = handle.where.remote()  # asked while it answers
        self._mailbox = Mailbox(name, self._submit, self._collect)

    async def call(self, method: str, /, *args: Any) -> Any:
        with unwrapped(self.name, method):
            return await self.handle.call.remote(method, *args)

    async def where(self) -> Where:
        with unwrapped(self.name, "where it is"):
            return await self._where

    async def ping(self) -> None:
        with unwrapped(self.name, "ping"):
            await self.handle.where.remote()

    async def post(self, method: str, /, *args: Any) -> Any:
        return await self._mailbox.call(method, *args)

    async def node(self) -> str:
        with unwrapped(self.name, "where it is"):
            return await self.handle.node.remote()

    async def stacks(self) -> str:
        try:
            return await within(self.handle.stacks.remote(), _STACKS_S, f"{self.name}: stacks", idle=True)
        except RayActorError as error:
            return f"its process has ended: {error}"
        except DeadlineExceeded:
            return f"does not answer within {_STACKS_S:g} s; {await self._seen()}"

    async def _seen(self) -> str:
        """What can be seen of its process without its help."""
        try:
            where = await within(self.where(), _WHERE_S, f"{self.name}: where it is", idle=True)
        except (DeadlineExceeded, WorkerDied):
            return "it has not answered since it was started"
        if where.machine != machine():
            return f"its process is {where.pid} on {where.host}"
        return await asyncio.to_thread(described, where.pid)

    def kill(self) -> None:
        ray.kill(self.handle)

    def __reduce__(self) -> tuple[type[RayWorker], tuple[str, Any]]:
        """It travels to other actors without the calls of this process."""
        return RayWorker, (self.name, self.handle)

    async def _submit(self, caller: int, calls: Sequence[Call]) -> None:
        with unwrapped(self.name, calls[0].method or "taking calls back"):
            await self.handle.submit.remote(caller, calls)

    async def _collect(self, caller: int, wait_s: float) -> list[Answer]:
        with unwrapped(self.name, "answering"):
            return await self.handle.collect.remote(caller, wait_s)


class LocalWorker:
    """A `Worker` in this process, for tests and for driving a step by hand."""

    def __init__(self, name: str, instance: Any) -> None:
        self.name = name
        self._object = instance

    async def call(self, method: str, /, *args: Any) -> Any:
        result = getattr(self._object, method)(*args)
        return await result if inspect.isawaitable(result) else result

    post = call

    async def node(self) -> str:
        return ""

    async def where(self) -> Where:
        return Where(socket.gethostname(), os.getpid(), machine())

    async def ping(self) -> None: ...

    async def stacks(self) -> str:
        return "in this process"

    def kill(self) -> None:
        """There is no process to end: whatever holds this call would hold its caller too."""


def spawn(
    role: str, factory: Callable[..., Any], *args: Any, gpus: float = 0, env: Mapping[str, str] | None = None, **ray_options: Any
) -> RayWorker:
    """Starts an actor around `factory(*args)`; `env` are environment variables of its process, `ray_options` what Ray shall know beside.

    Actors that it spawns itself have its `env` too: Ray hands it down.
    """
    return RayWorker(role, _HOST.options(**actor_options(gpus, env, ray_options)).remote(factory, *args))


def actor_options(gpus: float, env: Mapping[str, str] | None, ray_options: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray shall know of the process of an actor."""
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": _CONCURRENT_CALLS, **ray_options}
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    return options
