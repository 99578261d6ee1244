"""An environment with one tool: the model writes Python, the environment runs it in a sandbox and replies with what it printed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from verst.errors import EnvironmentFailure, ExtensionError
from verst.rollout.sandbox import Limits, Outcome, Sandbox, refusal
from verst.rollout.tool_calls import Call, Malformed, first_call
from verst.types import Completion, FinishReason, Message, Prompt, Reply

_log = logging.getLogger(__name__)

INSTRUCTIONS = (
    "You can run Python: write one ```python block and end your message. You are told what it prints, and can go on. Each block runs on "
    "its own, without network. Your final answer is a message without a block."
)


class PythonTool:
    """Runs the first call of each completion (`verst.rollout.tool_calls`), up to `max_calls`; a completion without one ends the trajectory.

    The completion after the last call ends it too, whatever it holds. A malformed call is explained to the model; it counts as a call and
    as an error. A completion that was cut by its limit of tokens runs nothing. `info` has `tool_calls`, `tool_errors` (calls that were
    malformed, exited with an error, or were ended) and `tool_timeouts` (those of them that were ended by the clock).

    Args:
        max_calls: `rollout.max_turns` must be larger.
        role: of the replies; `tool` for chat templates that know it.
        instructions: added to the last message of the prompt.
        allow_unisolated: where the kernel allows no namespaces, run code all the same: with this process's files and its network. By
            default a replica does not start there.
        limits: fields of `verst.rollout.sandbox.Limits`, such as `timeout_s`.
    """

    def __init__(
        self, max_calls: int = 4, role: str = "user", instructions: str = INSTRUCTIONS, allow_unisolated: bool = False, **limits: Any
    ) -> None:
        if not isinstance(max_calls, int) or max_calls < 1:
            raise ValueError(f"max_calls is {max_calls!r}; it must be a whole number of at least 1")
        self.turns = max_calls + 1
        self._limits = Limits(**limits)
        self._left, self._role, self._instructions = max_calls, role, instructions
        self._allow_unisolated = allow_unisolated
        self._calls = self._errors = self._timeouts = 0
        self._sandbox: Sandbox | None = None

    @classmethod
    def check_machine(cls, allow_unisolated: bool = False, **_: Any) -> None:
        """Raises `ExtensionError` if code cannot be isolated here, and is not allowed to run otherwise."""
        reason = refusal()
        if reason is None:
            return
        if not allow_unisolated:
            raise ExtensionError(_refused(reason))
        _log.warning("environment python_tool runs code without isolation, as allow_unisolated says (%s)", reason)

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        reason = await asyncio.to_thread(refusal)
        if reason is not None and not self._allow_unisolated:
            raise EnvironmentFailure(_refused(reason))
        self._sandbox = Sandbox(self._limits, isolated=reason is None)
        *before, last = prompt.messages
        return (*before, replace(last, content=f"{last.content}\n{self._instructions}".strip()))

    async def reply(self, completion: Completion) -> Reply:
        call = None if completion.finish is FinishReason.LENGTH or not self._left else first_call(completion.text)
        if call is None:
            return Reply(info=self._info())
        self._left -= 1
        self._calls += 1
        told = await self._answer(call)
        return Reply((Message(self._role, told),), done=False, info=self._info())

    async def close(self) -> None:
        if self._sandbox is not None:
            await self._sandbox.close()

    async def _answer(self, call: Call | Malformed) -> str:
        if isinstance(call, Malformed):
            self._errors += 1
            return call.reason
        assert self._sandbox is not None, "replies come after start"
        outcome = await self._sandbox.run(call.code)
        self._errors += not outcome.ok
        self._timeouts += outcome.timed_out
        told = _described(outcome, self._limits)
        return f"{told}\n[only the first of your blocks was run]" if call.more else told

    def _info(self) -> dict[str, int]:
        return {"tool_calls": self._calls, "tool_errors": self._errors, "tool_timeouts": self._timeouts}


def _described(outcome: Outcome, limits: Limits) -> str:
    lines = [outcome.output.rstrip("\n") or ("[no output]" if outcome.ok else "")]
    if outcome.cut:
        lines.append(f"[output cut after {limits.output_bytes} bytes]")
    if outcome.timed_out:
        lines.append(f"[ended: it took longer than {limits.timeout_s:g} s]")
    elif outcome.flooded:
        lines.append("[ended: it printed too much]")
    elif outcome.exit_code is None:
        lines.append(f"[ended by {outcome.signal or 'an unknown cause'}]")
    elif outcome.exit_code:
        lines.append(f"[exit code {outcome.exit_code}]")
    return "\n".join(filter(None, lines))


def _refused(reason: str) -> str:
    return (
        f"environment python_tool: this machine does not let Python be isolated: {reason}. Allow user namespaces (in a container, by its "
        "seccomp profile or CAP_SYS_ADMIN), or set allow_unisolated in rollout.environment_options, which gives the code files and network"
    )
