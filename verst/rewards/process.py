"""The parent's end of one reward worker."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from verst.isolated.process import IsolatedProcess
from verst.rewards.spec import RewardSpec
from verst.types import Trajectory

_ASYNC_GRACE_S = 1.0
"""An async reward's deadline is kept inside the worker; this much later the worker itself is judged to be stuck."""


class Death(NamedTuple):
    """Why a worker cannot be used any more. `began`: its request was under way. `outside`: somebody killed it, such as the kernel."""

    reason: str
    words: str
    began: bool
    outside: bool = False


class RewardProcess(IsolatedProcess):
    """A worker that has loaded its reward.

    `concurrent` says that all trajectories that are with it are scored at the same time (the reward is async), else in order; `grouped`,
    that those of a request are scored in one call.
    """

    concurrent = False
    grouped = False
    _deadline_s: float

    @classmethod
    async def start(
        cls, spec: RewardSpec, deadline_s: float, log: Path | None, secrets: Sequence[str] = (), *, gpus: bool = False
    ) -> RewardProcess:
        """Raises `ExtensionError` with the reason if the reward cannot be loaded, `DeadlineExceeded` if that takes too long."""
        worker = await cls.launch("verst.rewards.worker", log, (*spec.secrets, *secrets), gpus=gpus)
        worker._deadline_s = deadline_s
        loaded = await worker.load((spec, deadline_s), f"reward {spec.name}")
        worker.concurrent, worker.grouped = loaded["concurrent"], loaded["grouped"]
        return worker

    async def request(self, number: int, fields: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        """Replies come with this number: one when the request begins, and one for each trajectory."""
        await self.send((number, fields, trajectories))

    async def reply(self, *, began: bool = False) -> dict[str, Any] | Death:
        """The next reply, or why there will be none. `began`: what the death then says of the request."""
        try:
            reply = await self.receive(self._deadline_s + (_ASYNC_GRACE_S if self.concurrent else 0))
        except TimeoutError:
            return Death("deadline", f"exceeded {self._deadline_s:g} s: make it faster, or raise reward.deadline_s", began)
        if reply is None:
            how = await self.ended()
            words = f"broke: its process {how}; what it printed is in {self.output}"
            return Death("crash", words, began, outside=how.endswith(signal.SIGKILL.name))
        return reply
