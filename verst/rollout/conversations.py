"""The conversations of one trajectory whose agent asks the policy.

Who waits for whom: the agent waits for its calls, each of which a task of its own answers, so that any number may be under way. The
trajectory waits for the agent's next call or its end; while no call is under way the agent has a deadline. Whatever an answer raises is
the engine's, and ends the trajectory; whatever the agent raises fails it.

Each conversation has a transcript. A call goes on behind an answer: in the transcript of that answer if it is the first to do so, else in
another one, in which what was sampled so far counts as given. So every token is trained once, where it was sampled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.data.call_forms import JSON, CallForm
from verst.errors import DataError, EnvironmentFailure
from verst.extend import described
from verst.fields import apart
from verst.rollout.agent import Agents
from verst.rollout.boundary import CLOSE_DEADLINE_S, checked_info, result_of
from verst.rollout.fields import GivenFields
from verst.rollout.policy import Opening, Policy
from verst.rollout.race import Cut
from verst.rollout.sessions import FULL, Call, Session, SessionRefused
from verst.rollout.transcript import Transcript
from verst.rollout.user_loop import Caller, UserLoop
from verst.types import FinishReason, Message, Prompt, Status, Trajectory

_ORDERLY_S = 30.0
"""For what an agent has to do once it was told that there is no room, such as scoring. One that does not end is ended."""

_MOST_REFUSED = 1000
"""Calls of one trajectory. A client that asks the same again at once, whatever it is told, would go on until its deadline."""


class Conversations:
    """Answers the calls of one agent.

    Args:
        max_turns: answers that it is given in all; the call after them ends the trajectory.
        deadline_s: limit of each time in which it asks nothing.
        opening: gives the tokens of the first call, with its tools, or raises if they cannot be answered.
        users: where the agent runs, if it is async.
    """

    def __init__(
        self, agents: Agents, prompt: Prompt, policy: Policy, max_turns: int, deadline_s: float, opening: Opening, users: UserLoop
    ) -> None:
        self._agents, self._prompt, self._policy = agents, prompt, policy
        self._max_turns, self._deadline_s, self._opening = max_turns, deadline_s, opening
        self._users, self._caller = users, Caller(agents.title)
        self._session: Session
        self._agent: asyncio.Future[Any] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._transcripts: list[Transcript] = []  # in the order in which they began
        self._last: Transcript | None = None  # had the last answer
        self._ends: dict[Call, tuple[Transcript, int]] = {}  # where each answer ends: after so many turns
        self._turns = self._refused = 0
        self._thinks_since = 0.0
        self._full = False  # no call was accepted since one was refused for want of room
        self._ending = False  # nor was one answered, so that the agent is expected to end
        self._limited = False
        """Whether a limit of tokens cut an answer or left no room for one."""
        self._info: dict[str, Any] = {}
        self._fields = GivenFields()

    @property
    def generated(self) -> int:
        """Tokens that were sampled so far."""
        return sum(transcript.generated for transcript in self._transcripts)

    async def roll(self) -> Status:
        """Answers until the agent has ended or a limit ends it. Raises `EnvironmentFailure`, `Cut`, and what an engine raises."""
        self._session = await self._agents.open()
        self._agent = self._agents.begin(self._session, self._prompt, self._users, self._caller)
        self._think()
        try:
            return await self._policy.race.unless_over(self._serve())
        except Cut:
            if self._answering:  # the race has had them aborted: what they have counts
                await asyncio.wait(self._answering)
            raise

    async def close(self) -> EnvironmentFailure | None:
        """Ends the agent, and what it has asked. One that does not end is a failure, which is returned, so that it hides no other error."""
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        if self._agent is None:
            return None
        self._agents.forget(self._session)
        self._agent.cancel()
        if not await self._users.within(self._agent, CLOSE_DEADLINE_S, self._caller):
            return EnvironmentFailure(f"{self._agents.title} did not end within {CLOSE_DEADLINE_S:g} s of being cancelled")
        if not self._agent.cancelled():
            self._agent.exception()  # seen: it has been reported, or came of the end
        return None

    def trajectory(self, status: Status) -> Trajectory:
        """Its own arrays are those of the conversation that had the last answer."""
        own, others = self._sequences()
        own.info, own.fields = self._info, self._fields
        return own.trajectory(self._policy.name, status, self._policy.seed, others)

    # ---- calls

    async def _serve(self) -> Status:
        while (call := await self._next()) is not None:
            if self._turns == self._max_turns:
                await self._answered()
                self._info |= self._noted()
                return Status.TRUNCATED
            self._take(call)
            if self._refused == _MOST_REFUSED:
                await self._answered()
                break
        return self._ended()

    async def _next(self) -> Call | None:
        """The agent's next call; None if it has ended, or should have. Raises what one of its answers raised."""
        assert self._agent is not None
        asking = asyncio.ensure_future(self._session.asked())
        try:
            while not self._agent.done():
                if asking.done():
                    return asking.result()
                waited, left_s = {asking, self._agent, *self._answering}, self._patience_s()
                done, _ = await asyncio.wait(waited, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if not done and await self._users.overdue(self._caller, self._thinks_since, self._limit_s):
                    return self._out_of_time()
                self._settle()
            return None
        finally:
            asking.cancel()

    def _settle(self) -> None:
        """Takes note of answers that were given. Raises what one of them raised."""
        given = {task for task in self._answering if task.done()}
        self._answering -= given
        self._ending &= not given  # it has something to work on
        if failures := [error for task in given if (error := task.exception()) is not None]:
            raise failures[0]
        if given and not self._answering:
            self._think()

    def _think(self) -> None:
        self._thinks_since = time.monotonic()
        self._policy.waits_for(f"{self._agents.title} to ask")

    def _patience_s(self) -> float | None:
        """How long the agent may go on thinking. None: it waits for an answer itself."""
        if self._answering:
            return None
        return self._users.left_s(self._caller, self._thinks_since, self._limit_s)

    @property
    def _limit_s(self) -> float:
        return _ORDERLY_S if self._ending else self._deadline_s

    def _out_of_time(self) -> None:
        if not self._ending:
            raise EnvironmentFailure(f"{self._agents.title} took longer than {self._deadline_s:g} s to ask again or to end")

    async def _answered(self) -> None:
        """Returns once no call is under way."""
        while self._answering:
            await asyncio.wait(self._answering, return_when=asyncio.FIRST_COMPLETED)
            self._settle()

    def _take(self, call: Call) -> None:
        """Begins to answer a call, or refuses it."""
        try:
            transcript = self._opened(call)
        except SessionRefused as refusal:
            self._session.refuse(call, str(refusal))
            self._refused += 1
            if self._refused == _MOST_REFUSED and not self._full:
                raise EnvironmentFailure(
                    f"{self._agents.title}: {_MOST_REFUSED} of its calls were refused, the last with: {refusal}"
                ) from refusal
            return
        self._full = self._ending = False
        self._answering.add(asyncio.create_task(self._answer(call, self._turns, transcript)))
        self._turns += 1

    def _opened(self, call: Call) -> Transcript:
        """The transcript in which a call waits for its answer. Raises `SessionRefused` if it has no room, or cannot be rendered."""
        messages = self._messages(call)
        if not self._transcripts:  # the first call's: what is wrong with it is said of the prompt
            transcript, given_T = Transcript(), self._opening(messages, call.tools)
        else:
            transcript = self._before(call)
            given_T = self._given(call, messages, self._policy.max_model_tokens - transcript.length)
        if transcript not in self._transcripts:
            self._transcripts.append(transcript)
        transcript.give(given_T, messages)
        return transcript

    def _messages(self, call: Call) -> list[Message]:
        """What a call says, as the policy reads it."""
        form = self._form(call)
        try:
            return [said.message(form) for said in call.new]
        except RecursionError as error:
            raise SessionRefused("the arguments of a call are nested too deeply to be written") from error

    def _form(self, call: Call) -> CallForm:
        """How the policy calls tools. A template is asked only if there are any."""
        return self._policy.renderer.call_form if call.tools or any(said.calls for said in call.new) else JSON

    def _before(self, call: Call) -> Transcript:
        """What stands before a call: of an answer that another call goes on from, or has, a copy."""
        if call.behind is None:
            return Transcript()
        if call.behind.cut:
            raise self._no_room()
        transcript, turns = self._ends[call.behind]
        return transcript if transcript.closed and turns == len(transcript.turns) else transcript.first(turns, given=True)

    def _given(self, call: Call, messages: Sequence[Message], room: int) -> NDArray[np.int32]:
        """`[T]` what a call puts behind the tokens before it, fewer than `room`."""
        if not self._policy.renderer.may_fit(messages, room):
            raise self._no_room()
        try:
            given_T = self._rendered(call, messages)
        except DataError as error:
            raise SessionRefused(f"these messages cannot be rendered: {error}") from error
        if len(given_T) >= room:  # none would be left for the answer
            raise self._no_room()
        return given_T

    def _rendered(self, call: Call, messages: Sequence[Message]) -> NDArray[np.int32]:
        renderer = self._policy.renderer
        if call.behind is None:
            opening_T = renderer.opening(messages, call.tools)
            if not len(opening_T):
                raise SessionRefused("these messages have no tokens: give them some text")
            return opening_T
        assert call.behind.answer is not None
        return renderer.continuation(messages, last=call.behind.answer.completion.tokens[-1], tools=call.tools)

    def _no_room(self) -> SessionRefused:
        """From now on the agent is expected to end, unless it asks for less or has an answer to come."""
        if not self._ending and not self._answering:
            self._think()
        self._full = self._ending = self._limited = True
        return SessionRefused(FULL)

    async def _answer(self, call: Call, turn: int, transcript: Transcript) -> None:
        completion = await self._policy.turn(turn, transcript)
        self._last = transcript
        self._ends[call] = (transcript, len(transcript.turns))
        self._limited |= completion.finish is FinishReason.LENGTH
        self._session.answer(call, turn, completion, transcript.turns[-1].generated, self._form(call))

    # ---- the end

    def _ended(self) -> Status:
        """Of an agent that has ended, or was refused for want of room and has not ended in time, or was refused too often."""
        agent, title = self._agent, self._agents.title
        assert agent is not None
        broke = not agent.done() or agent.cancelled() or agent.exception() is not None
        if self._full and broke:
            if self._last is None:
                raise EnvironmentFailure(f"{title}: a call had no room, and it ended before any of its calls was answered")
            self._info |= self._noted()
            return Status.TRUNCATED
        returned = result_of(agent, title)
        if not isinstance(returned, Mapping | None):
            raise EnvironmentFailure(f"{title} returned {described(returned)}, not a mapping or None")
        if self._last is None:
            raise EnvironmentFailure(f"{title} ended without asking for a completion")
        plain, fields = apart(checked_info(returned or {}, title))
        self._info |= {**plain, **self._noted()}
        own, others = self._sequences()
        self._fields.take(fields, own.generated + sum(other.generated for other in others), title)
        return Status.TRUNCATED if self._limited else Status.FINISHED

    def _sequences(self) -> tuple[Transcript, list[Transcript]]:
        """The conversation that had the last answer, and the others in which there is any: without what is still unanswered."""
        if self._last is None:
            return (self._transcripts or [Transcript()])[0], []
        others = [transcript for transcript in self._transcripts if transcript.turns and transcript is not self._last]
        return self._last.first(len(self._last.turns)), [other.first(len(other.turns)) for other in others]

    def _noted(self) -> dict[str, Any]:
        """What the session has to say of its calls."""
        noted = {"not_heeded": sorted(self._session.not_heeded), "malformed_calls": self._session.malformed}
        return {name: value for name, value in noted.items() if value}
