"""Training hooks: the user's objects that see each committed step, each in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from verst.config.schema import HooksConfig
from verst.errors import CallFailed
from verst.hooks import PREFIX, HookSpec
from verst.isolated.call import Called, Caller
from verst.observe.spans import Spans

LOG = "hooks.log"


class Hooks(Called):
    """Of one run. They are asked at the same time, so together they hold a step no longer than one deadline.

    One whose process is gone, for its deadline or by itself, has lost what it knew of earlier steps, and is given up until the run is
    started again. `tell` gets warnings.
    """

    def __init__(self, config: HooksConfig, logs: Path, tell: Callable[[str], None], secrets: Sequence[str] = ()) -> None:
        self._required, self._tell = config.required, tell
        specs = (HookSpec(name, options) for name, options in config.classes.items())
        super().__init__(specs, deadline_s=config.deadline_s, option="hooks.deadline_s", log=logs / LOG, secrets=secrets)
        self._any = bool(self._callers)
        self._fatal: CallFailed | None = None
        self._told: dict[str, str] = {}

    async def after_step(self, step: int, metrics: Mapping[str, float], spans: Spans) -> dict[str, float]:
        """The metrics that hooks add to those of a step. A hook that fails adds none."""
        if not self._any:
            return {}
        asked = list(self._callers)
        with spans("hooks"):
            answers = await asyncio.gather(*(caller.call(step, dict(metrics)) for caller in asked), return_exceptions=True)
        found: dict[str, float] = {}
        failed = 0
        for caller, answer in zip(asked, answers, strict=True):
            if isinstance(answer, CallFailed):
                failed += 1
                self._fail(caller, step, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found |= {f"{PREFIX}{name}": value for name, value in answer.items()}
        return found | {"hooks/failed": float(failed), "hooks/active": float(len(self._callers))}

    def check(self) -> None:
        """Raises `CallFailed` if one has failed and hooks are required. Apart from `after_step`, so that the step is reported first."""
        if self._fatal is not None:
            raise self._fatal

    def _fail(self, caller: Caller, step: int, failure: CallFailed) -> None:
        if self._required and self._fatal is None:
            self._fatal = CallFailed(f"after step {step}: {failure} (hooks.required ends the run)")
        words = str(failure)
        if failure.lost:
            self._callers.remove(caller)
            words += "; it is given up until the run is started again"
        if self._told.get(caller.title) != words:  # not in every step
            self._tell(f"warning: after step {step}: {words}")
        self._told[caller.title] = words
