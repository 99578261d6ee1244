"""Rolling one group: every trajectory of a prompt at once, turn by turn, exact to the token.

Who waits for whom: each trajectory waits in turn for the engine (its generation) and for its own environment (its reply, with a deadline;
`verst.rollout.dialogue`) or its agent (its next call; `verst.rollout.conversations`); the group waits for all of its trajectories, or for
as many as it wants (`verst.rollout.race`). An environment's failure ends its trajectory, an engine's failure ends the group. A trajectory
that the group's deadline finds unfinished has failed; if the engine has done nothing at all meanwhile, that is the engine's failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.data.chat import ChatRenderer
from verst.errors import DataError, DeadlineExceeded, EnvironmentFailure, RoutesRefused, VerstError
from verst.observe.waits import Waits
from verst.protocols import Engine, Environment
from verst.rollout.agent import Agents
from verst.rollout.boundary import GuardedEnvironment
from verst.rollout.clock import Clock
from verst.rollout.conversations import Conversations
from verst.rollout.dialogue import Dialogue
from verst.rollout.policy import Policy, stable_seed
from verst.rollout.race import Cut, Race
from verst.rollout.recorded import Recorded
from verst.rollout.rollouts import Rollouts
from verst.rollout.tokens import Asked, Rolling
from verst.rollout.user_loop import Caller, UserLoop
from verst.types import NO_VERSION, FinishReason, Group, Message, Prompt, Sampling, Status, Trajectory, Turn


@dataclass(frozen=True)
class GroupRoller:
    """Makes the groups of one engine. `dataclasses.replace` gives a variant, such as one trajectory at temperature 0 for evaluation.

    Args:
        environment: makes a fresh environment, called once for each trajectory; or the `Rollouts` of a rollout function; or agents.
        sampling: of every turn; the template's end-of-turn token is added to its stop tokens.
        group_size: trajectories of each prompt.
        oversample: trajectories rolled beyond them; the last to end are cut.
        max_turns: completions a trajectory may have.
        max_prompt_tokens: a longer opening is an error.
        max_model_tokens: limit of a whole conversation, environment replies included.
        seed: the run's. With admission number, member and turn it fixes the seed of every request.
        environment_deadline_s: limit of each call of an environment, and of each time in which an agent asks nothing.
        engine_name: what messages call the engine.
        waits: where each trajectory says, under its id, what it waits for.
        clock: what deadlines of trajectories are counted by.
        users: where the environment's, agent's or function's coroutines run.

    Raises `ModelError` if there may be several turns and the chat template cannot be continued.
    """

    engine: Engine
    renderer: ChatRenderer
    environment: Callable[[], Environment] | Agents | Rollouts
    sampling: Sampling
    group_size: int
    max_turns: int
    max_prompt_tokens: int
    max_model_tokens: int
    seed: int
    environment_deadline_s: float
    oversample: int = 0
    engine_name: str = "the engine"
    waits: Waits = field(default_factory=Waits)
    clock: Clock = field(default_factory=Clock)
    users: UserLoop = field(default_factory=UserLoop)

    def __post_init__(self) -> None:
        if self.max_turns > 1 and not isinstance(self.environment, Rollouts):
            self.renderer.require_continuable()

    async def roll(self, seq: int, prompt: Prompt, deadline_s: float | None = None, recorded: Recorded | None = None) -> Group:
        """The group with admission number `seq`. Rolled again, under the same weights, it gets the same random numbers.

        `recorded`: keeps what is generated of it, and may know what another replica had.

        Trajectories that are not finished after `deadline_s` have failed, and their requests are cancelled. None: the caller has a limit.

        Raises `EngineFailure` if the engine broke, `DeadlineExceeded` if it did nothing at all up to the deadline, `DataError` if the
        prompt is too long or the template refuses it; the other trajectories are cancelled then. A cancelled call cancels its requests.
        """
        started = time.perf_counter()
        admitted_version = self.engine.version
        numbers = range(self.group_size + self.oversample)
        race = Race(recorded or Recorded(self.engine), self.group_size, len(numbers))
        try:
            async with asyncio.TaskGroup() as members:
                tasks = [members.create_task(self._trajectory(seq, member, prompt, race, deadline_s)) for member in numbers]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first broke the group; the others are its echoes
        timings = {"roll_s": time.perf_counter() - started}
        ended = [task.result() for task in tasks]
        kept = tuple(member for member in ended if isinstance(member, Trajectory))
        cut = tuple(member for member in ended if not isinstance(member, Trajectory))
        return Group(seq, prompt, kept, admitted_version, timings, cut)

    def demonstrate(self, seq: int, prompt: Prompt) -> Group:
        """A group made of the answers that the data has to the prompt: the demonstration or, of a pair, the better and the worse one.

        Nothing is generated or scored: tokens have no policy version and log-probability 0. The reward is 0, that of the better of two 1.

        Raises `DataError` if the prompt has no demonstration, or prompt or answer are too long.
        """
        if not prompt.demonstration:
            raise DataError(f"prompt {prompt.id} has no demonstration to imitate: name its column, data.columns={{demonstration: COLUMN}}")
        answers = [prompt.demonstration, prompt.rejected] if prompt.rejected else [prompt.demonstration]
        best = len(answers) - 1
        trajectories = tuple(self._given(seq, i, prompt, answer, float(best - i)) for i, answer in enumerate(answers))
        return Group(seq, prompt, trajectories, admitted_version=self.engine.version)

    def _given(self, seq: int, member: int, prompt: Prompt, answer: tuple[Message, ...], reward: float) -> Trajectory:
        """A trajectory of an answer that the data has."""
        tokens_T, mask_T = self.renderer.demonstration(prompt.messages, answer)
        self.check_prompt(prompt, int(mask_T.argmax()))
        if len(tokens_T) > self.max_model_tokens:
            raise DataError(
                f"prompt {prompt.id} with its answer has {len(tokens_T)} tokens, above the limit of a trajectory "
                f"({self.max_model_tokens}): shorten it, or raise rollout.max_new_tokens"
            )
        return Trajectory(
            id=f"{seq}/{member}",
            tokens_T=tokens_T,
            loss_mask_T=mask_T,
            logprobs_T=np.zeros(len(tokens_T), np.float32),
            versions_T=np.full(len(tokens_T), NO_VERSION, np.int32),
            turns=self._imitated_turns(tokens_T, mask_T),
            messages=(*prompt.messages, *answer),
            status=Status.FINISHED,
            seed=stable_seed(self.seed, seq, member),
            reward=reward,
        )

    def check_prompt(self, prompt: Prompt, tokens: int) -> None:
        """Raises `DataError` unless a prompt of so many tokens can be answered."""
        begins = f"({prompt.messages[-1].content[:40]!r}…)"
        if not tokens:
            raise DataError(f"prompt {prompt.id} {begins} has no tokens: give it some text, or a chat template that writes it")
        if tokens > (limit := self._longest_opening):
            raise DataError(
                f"prompt {prompt.id} {begins} has {tokens} tokens, above the limit of {limit}: raise data.max_prompt_tokens "
                f"({self.max_prompt_tokens}), or remove the prompt"
            )

    @property
    def _longest_opening(self) -> int:
        return min(self.max_prompt_tokens, self.max_model_tokens - 1)

    def opening(self, prompt: Prompt, given: Asked | Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> NDArray[np.int32]:
        """`[T]` what a trajectory begins with: messages, or tokens of a rollout function.

        Raises `DataError` if the prompt's own cannot be answered, which ends the run; `EnvironmentFailure` if it is for what user code made
        of them, or for the tools that it tells of, which fails the trajectory.
        """
        own = not isinstance(given, Asked) and tuple(given) == prompt.messages
        if own and not tools:
            opening_T = self.renderer.opening(prompt.messages)
            self.check_prompt(prompt, len(opening_T))
            return opening_T
        what = "the prompt with its tools" if own else "the opening, which is not the prompt's messages,"
        try:
            opening_T = self._made(given, tools)
        except DataError as error:
            if own:
                self.check_prompt(prompt, len(self.renderer.opening(prompt.messages)))
            raise EnvironmentFailure(f"{what} cannot be rendered: {error}") from error
        if not 0 < len(opening_T) <= self._longest_opening:
            if own or isinstance(given, Asked):  # whose tokens may still be the prompt's
                self.check_prompt(prompt, len(self.renderer.opening(prompt.messages)))
            raise EnvironmentFailure(
                f"{what} has {len(opening_T)} tokens, where 1 to {self._longest_opening} can be: "
                f"shorten it, or raise data.max_prompt_tokens ({self.max_prompt_tokens})"
            )
        return opening_T

    def _made(self, given: Asked | Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> NDArray[np.int32]:
        if isinstance(given, Asked):
            return np.asarray(given.tokens, np.int32)
        if not self.renderer.may_fit(given, self._longest_opening):  # to tokenize it would take minutes
            letters = sum(len(message.content) for message in given)
            raise DataError(f"{letters} characters cannot be {self._longest_opening} tokens: raise data.max_prompt_tokens")
        return self.renderer.opening(given, tools)

    async def _trajectory(self, seq: int, member: int, prompt: Prompt, race: Race, deadline_s: float | None) -> Trajectory | int:
        """The trajectory, or the number of tokens it had when it was cut."""
        name, seed = f"{seq}/{member}", stable_seed(self.seed, seq, member)
        rolled = self._begin(prompt, name, seed, race)
        status: Status = Status.FAILED
        failure: VerstError | None = None
        cut = False
        processed = self._processed_tokens()
        limit = self.clock.limit(deadline_s)
        try:
            async with limit:
                status = await rolled.roll()
        except Cut:
            cut = True
        except (EnvironmentFailure, RoutesRefused) as error:
            failure, cut = error, race.over
        except TimeoutError:
            if not limit.expired():
                raise
            failure = self._unfinished(name, prompt, deadline_s, processed)
        except asyncio.CancelledError:
            self.waits.end(name)
            raise
        finally:
            closing_failure = await rolled.close()
        self.waits.end(name)  # not after an error, which ends the run: then it tells what was waited for
        if cut:
            return rolled.generated
        failure = failure or closing_failure
        trajectory = rolled.trajectory(status)
        if failure is not None:
            return trajectory.failed(str(failure))
        return trajectory if await race.ended() else trajectory.generated_tokens

    def _begin(self, prompt: Prompt, name: str, seed: int, race: Race) -> Dialogue | Conversations:
        """What rolls a trajectory."""
        policy = Policy(self.engine, self.engine_name, self.renderer, self.sampling, self.max_model_tokens, race, name, seed, self.waits)
        opening = partial(self.opening, prompt)
        made, deadline_s = self.environment, self.environment_deadline_s
        if isinstance(made, Agents):
            return Conversations(made, prompt, policy, self.max_turns, deadline_s, opening, self.users)
        caller = None
        if isinstance(made, Rollouts):
            rolling = Rolling(self.renderer, self.sampling, self.max_turns, self.max_model_tokens, self.group_size)
            caller = Caller(made.title)
            made = made.bound(rolling, self.users, caller)
        return Dialogue(GuardedEnvironment(made, deadline_s, self.users, rolls=caller), prompt, policy, self.max_turns, opening)

    def _processed_tokens(self) -> float | None:
        """What shows that the engine works, while its requests are under way; None if it cannot tell."""
        return self.engine.stats().get("processed_tokens")

    def _unfinished(self, name: str, prompt: Prompt, deadline_s: float | None, processed: float | None) -> DeadlineExceeded:
        """Why a trajectory has failed that the deadline found unfinished. Raises it if the engine does not work any more."""
        awaited = self.waits.of(name)
        long = 2 * self.waits.seconds(name) > (deadline_s or 0.0)  # one that was asked a moment ago has had no time to begin
        if awaited == self.engine_name and long and processed is not None and self._processed_tokens() == processed:
            raise DeadlineExceeded(
                f"{self.engine_name} processed no token for {deadline_s:g} s, while trajectory {name} ({prompt.id}) waited for it"
            )
        if self.users.held is not None:
            awaited = f"{awaited}, while {self.users.held}"
        return DeadlineExceeded(
            f"not finished after {deadline_s:g} s, waiting for {awaited}: if that is too little time, raise rollout.deadline_s"
        )

    def _imitated_turns(self, tokens_T: NDArray[np.int32], mask_T: NDArray[np.bool_]) -> tuple[Turn, ...]:
        """One turn for each run of imitated tokens, with the given tokens before it."""
        edges = [0, *(int(i) + 1 for i in np.flatnonzero(mask_T[1:] != mask_T[:-1])), len(mask_T)]
        given, imitated = list(pairwise(edges))[::2], list(pairwise(edges))[1::2]
        return tuple(
            Turn(start, begin, end, FinishReason.STOP, self.renderer.decode(tokens_T[begin:end]))
            for (start, _), (begin, end) in zip(given, imitated, strict=True)
        )
