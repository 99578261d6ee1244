"""One object of the user's in a process of its own, called with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from verst.errors import CallFailed, DeadlineExceeded, ExtensionError
from verst.isolated.process import IsolatedProcess


class Opens(Protocol):
    """What makes the object there. It is pickled, so its module must be importable."""

    @property
    def title(self) -> str:
        """Kind and name, for messages."""
        ...

    def open(self) -> Callable[..., Any]:
        """What answers the calls, with JSON values."""
        ...


class Caller:
    """Calls one object: one call at a time, the others wait. A process that died, or was ended for taking too long, is replaced.

    `remedy` ends the message about a call that took too long, `secrets` are environment variables that it may see (`verst.secrets`). All
    methods belong to one event loop.
    """

    def __init__(self, spec: Opens, *, deadline_s: float, remedy: str, log: Path | None = None, secrets: Sequence[str] = ()) -> None:
        self._spec, self._deadline_s, self._remedy, self._log, self._secrets = spec, deadline_s, remedy, log, secrets
        self._process: IsolatedProcess | None = None
        self._turn = asyncio.Lock()

    @property
    def title(self) -> str:
        return self._spec.title

    @property
    def pid(self) -> int | None:
        """Of the process that is there now."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Raises `ExtensionError` with the reason if the object cannot be made, `DeadlineExceeded` if that takes too long."""
        process = await IsolatedProcess.launch("verst.isolated.worker", self._log, self._secrets)
        await process.load(self._spec, self.title)
        self._process = process

    async def call(self, *arguments: Any) -> Any:
        """What the object returns. Raises `CallFailed` if it raises, takes longer than the deadline, or takes its process with it."""
        async with self._turn:
            if self._process is None:
                try:
                    await self.start()
                except (ExtensionError, DeadlineExceeded) as error:
                    raise CallFailed(f"{self.title} could not be started again: {error}", lost=True) from error
            answered = False
            try:
                reply = await self._exchange(arguments)
                answered = True
            finally:
                if not answered:  # it owes an answer, which nobody must take for that of the next call
                    self.close()
        if "error" in reply:
            raise CallFailed(f"{self.title} {reply['error']}")
        return reply["value"]

    def close(self) -> None:
        """Ends the process, and returns when it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    async def _exchange(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        process = self._process
        assert process is not None, "it was started"
        try:
            async with asyncio.timeout(self._deadline_s):
                await process.send(arguments)
            reply = await process.receive(self._deadline_s)
        except TimeoutError as error:
            raise CallFailed(f"{self.title} exceeded {self._deadline_s:g} s: {self._remedy}", lost=True) from error
        if reply is None:
            raise CallFailed(f"{self.title}: its process {await process.ended()}; what it printed is in {process.output}", lost=True)
        return reply


class Called:
    """The objects of one section of the run file, in its order, each with a process of its own. `option` is the one with their deadline."""

    def __init__(self, specs: Iterable[Opens], *, deadline_s: float, option: str, log: Path, secrets: Sequence[str] = ()) -> None:
        remedy = f"make it faster, or raise {option}"
        self._callers = [Caller(spec, deadline_s=deadline_s, remedy=remedy, log=log, secrets=secrets) for spec in specs]

    async def start(self) -> None:
        """Raises `ExtensionError` if one cannot be loaded: the reason is in the message."""
        for caller in self._callers:
            await caller.start()

    def close(self) -> None:
        for caller in self._callers:
            caller.close()
