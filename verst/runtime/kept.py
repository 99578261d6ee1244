"""Processes of a run that outlive its loop, and are found again by the next one.

Ray ends what an actor has started together with it. The loop's process may die like any other, so those that it starts are detached and
have names, of the run, of its configuration and of their role: a loop that starts again adopts those that live. A process that nobody has
asked for anything for long ends itself: its run is gone for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util import list_named_actors

from verst.config.schema import Config
from verst.runtime.actors import Host, RayWorker, Where, actor_options
from verst.runtime.mailbox import Answer, Call

NAMESPACE = "verst"
ORPHAN_S = 900.0
"""A loop asks its workers every few seconds, and takes minutes to start again at most."""
_LOOK_S = 15.0


class KeptHost(Host):
    """A process that does not end with the one that started it, but some time after everyone has forgotten it."""

    def __init__(self, factory: Callable[..., Any], *args: Any) -> None:
        super().__init__(factory, *args)
        self._heard, self._calls = time.monotonic(), 0
        self._watch = asyncio.get_running_loop().create_task(self._until_forgotten())

    async def _until_forgotten(self) -> None:
        while self._calls or time.monotonic() - self._heard < ORPHAN_S:  # noqa: ASYNC110 - it is time that is waited for
            await asyncio.sleep(min(_LOOK_S, ORPHAN_S / 4))
        os._exit(1)  # there is nobody to tell, and what it has started ends when it does

    async def call(self, method: str, *args: Any) -> Any:
        self._calls += 1
        try:
            return await super().call(method, *args)
        finally:
            self._calls -= 1
            self._heard = time.monotonic()

    async def where(self) -> Where:
        self._heard = time.monotonic()
        return await super().where()

    async def submit(self, caller: int, calls: Sequence[Call]) -> None:
        self._heard = time.monotonic()
        await super().submit(caller, calls)

    async def collect(self, caller: int, wait_s: float) -> list[Answer]:
        self._heard = time.monotonic()
        return await super().collect(caller, wait_s)


_KEPT: Any = ray.remote(KeptHost)


class Kept:
    """Starts the processes of a run, and knows those that an earlier loop of it has left."""

    def __init__(self, run_id: str, config: Config) -> None:
        """Ends those that were started with another configuration."""
        digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
        self._prefix = f"{run_id}/{digest}/"
        self._number = 0
        self._left: dict[str, RayWorker] = {}
        for name in sorted(_names(run_id), key=_number_of):
            self._find(name)

    def _find(self, name: str) -> None:
        try:
            handle = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:  # it has ended in this moment
            return
        self._number = max(self._number, _number_of(name) + 1)
        if not name.startswith(self._prefix):
            ray.kill(handle)
            return
        role = name.removeprefix(self._prefix).rpartition("/")[0]
        former = self._left.get(role)
        if former is not None:
            former.kill()
        self._left[role] = RayWorker(role, handle)

    def left(self, kind: str) -> dict[int, RayWorker]:
        """Those that an earlier loop has left of a kind, such as "replica", by their numbers. They may be dead, or busy with anything."""
        found = {role: re.fullmatch(rf"{re.escape(kind)} (\d+)", role) for role in self._left}
        return {int(match[1]): self._left[role] for role, match in found.items() if match}

    def take(self, kind: str) -> dict[int, RayWorker]:
        """The same, whom the caller adopts or ends."""
        taken = self.left(kind)
        self._left = {role: worker for role, worker in self._left.items() if worker not in taken.values()}
        return taken

    def spawn(
        self, role: str, factory: Callable[..., Any], *args: Any, gpus: float = 0, env: Mapping[str, str] | None = None, **ray_options: Any
    ) -> RayWorker:
        """As `verst.runtime.actors.spawn`; or the process that was left in that role, once."""
        if role in self._left:
            return self._left.pop(role)
        name = f"{self._prefix}{role}/{self._number}"
        self._number += 1
        options = actor_options(gpus, env, ray_options) | {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
        return RayWorker(role, _KEPT.options(**options).remote(factory, *args))

    def end_rest(self) -> None:
        """Ends those that were left and that nobody has adopted."""
        for worker in self._left.values():
            worker.kill()
        self._left = {}


def end_all(run_id: str) -> None:
    """Ends every process of a run whose loop was ended at once, and could end none of them."""
    for name in _names(run_id):
        with contextlib.suppress(ValueError):  # it has ended in this moment
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def _names(run_id: str) -> list[str]:
    everywhere: Any = list_named_actors(all_namespaces=True)
    names = (found["name"] for found in everywhere if found["namespace"] == NAMESPACE)
    return [name for name in names if name.startswith(f"{run_id}/")]


def restarted() -> bool:
    """Whether this is the process of an actor that Ray has started again, because the one before died."""
    if not ray.is_initialized():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of what it calls itself
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _number_of(name: str) -> int:
    number = name.rpartition("/")[2]
    return int(number) if number.isdecimal() else 0
