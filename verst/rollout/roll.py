"""Rolling one group: every trajectory of a prompt at once, turn by turn, exact to the token.

Who waits for whom: each trajectory waits in turn for the engine (its generation) and for its own environment (its reply, with a deadline);
the group waits for all of its trajectories, or for as many as it wants (`verst.rollout.race`). An environment's failure ends its
trajectory, an engine's failure ends the group. A trajectory that the group's deadline finds unfinished has failed; if the engine has done
nothing at all meanwhile, that is the engine's failure.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.data.chat import ChatRenderer
from verst.errors import DataError, DeadlineExceeded, EnvironmentFailure, RoutesRefused, VerstError
from verst.fields import apart
from verst.observe.waits import Waits
from verst.protocols import Engine, Environment
from verst.rollout.boundary import GuardedEnvironment, checked_experts, checked_generation
from verst.rollout.clock import Clock
from verst.rollout.race import Cut, Race
from verst.rollout.recorded import Recorded
from verst.rollout.rollouts import Rollouts
from verst.rollout.tokens import Asked, Ended, Rolling
from verst.rollout.transcript import Transcript
from verst.types import (
    NO_VERSION,
    Completion,
    FinishReason,
    GenerateRequest,
    Group,
    Message,
    Prompt,
    Reply,
    Sampling,
    Status,
    Trajectory,
    Turn,
)


def stable_seed(*parts: int) -> int:
    """A seed in [0, 2^63) that is the same in every process and on every machine, unlike Python's `hash`."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class GroupRoller:
    """Makes the groups of one engine. `dataclasses.replace` gives a variant, such as one trajectory at temperature 0 for evaluation.

    Args:
        environment: makes a fresh environment, called once for each trajectory; or the `Rollouts` of a rollout function.
        sampling: of every turn; the template's end-of-turn token is added to its stop tokens.
        group_size: trajectories of each prompt.
        oversample: trajectories rolled beyond them; the last to end are cut.
        max_turns: completions a trajectory may have.
        max_prompt_tokens: a longer opening is an error.
        max_model_tokens: limit of a whole trajectory, environment replies included.
        seed: the run's. With admission number, member and turn it fixes the seed of every request.
        environment_deadline_s: limit of each call of an environment.
        engine_name: what messages call the engine.
        waits: where each trajectory says, under its id, what it waits for.
        clock: what deadlines of trajectories are counted by.

    Raises `ModelError` if there may be several turns and the chat template cannot be continued.
    """

    engine: Engine
    renderer: ChatRenderer
    environment: Callable[[], Environment]
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
        limit = min(self.max_prompt_tokens, self.max_model_tokens - 1)
        begins = f"({prompt.messages[-1].content[:40]!r}…)"
        if not tokens:
            raise DataError(f"prompt {prompt.id} {begins} has no tokens: give it some text, or a chat template that writes it")
        if tokens > limit:
            raise DataError(
                f"prompt {prompt.id} {begins} has {tokens} tokens, above the limit of {limit}: raise data.max_prompt_tokens "
                f"({self.max_prompt_tokens}), or remove the prompt"
            )

    async def _trajectory(self, seq: int, member: int, prompt: Prompt, race: Race, deadline_s: float | None) -> Trajectory | int:
        """The trajectory, or the number of tokens it had when it was cut."""
        name, seed = f"{seq}/{member}", stable_seed(self.seed, seq, member)
        transcript = Transcript()
        environment = GuardedEnvironment(self._make_environment(), self.environment_deadline_s)
        status: Status = Status.FAILED
        failure: VerstError | None = None
        cut = False
        processed = self._processed_tokens()
        limit = self.clock.limit(deadline_s)
        try:
            async with limit:
                status = await self._converse(name, seed, prompt, environment, transcript, race)
                transcript.require_trained()
                transcript.fields.require_whole(transcript.generated, f"environment {environment.name}")
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
            closing_failure = await environment.close()
        self.waits.end(name)  # not after an error, which ends the run: then it tells what was waited for
        if cut:
            return transcript.generated
        failure = failure or closing_failure
        trajectory = transcript.trajectory(name, status, seed)
        if failure is not None:
            return trajectory.failed(str(failure))
        return trajectory if await race.ended() else trajectory.generated_tokens

    def _make_environment(self) -> Callable[[], Environment]:
        if not isinstance(self.environment, Rollouts):
            return self.environment
        rolling = Rolling(self.renderer, self.sampling, self.max_turns, self.max_model_tokens, self.group_size)
        return self.environment.bound(rolling)

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
        return DeadlineExceeded(
            f"not finished after {deadline_s:g} s, waiting for {awaited}: if that is too little time, raise rollout.deadline_s"
        )

    async def _converse(
        self, name: str, seed: int, prompt: Prompt, environment: GuardedEnvironment, transcript: Transcript, race: Race
    ) -> Status:
        """Turns until the environment ends the trajectory or a limit does."""
        self.waits.begin(name, f"environment {environment.name} to start")
        opening = await race.unless_over(environment.start(prompt))
        asked, tools = opening if isinstance(opening, Asked) else None, environment.tools
        opening_T = np.asarray(opening.tokens, np.int32) if isinstance(opening, Asked) else self.renderer.opening(opening, tools)
        self.check_prompt(prompt, len(opening_T))
        transcript.give(opening_T, prompt.messages if isinstance(opening, Asked) else opening)
        for turn in range(self.max_turns):
            self.waits.begin(name, self.engine_name)
            finish = await self._generate(f"{name}/{turn}", stable_seed(seed, turn), transcript, race, asked)
            completion = self._completion(transcript, finish)
            # A truncated completion is shown to the environment too: the reward may need what it has to say.
            self.waits.begin(name, f"environment {environment.name} to reply")
            reply = await race.unless_over(environment.reply(completion))
            if isinstance(reply, Asked | Ended):
                transcript.exclude(reply.excluded)
            plain, fields = apart(reply.info)
            transcript.info.update(plain)
            transcript.fields.take(fields, transcript.generated, f"{environment.name}.reply")
            asked = reply if isinstance(reply, Asked) else None
            if reply.done or (finish is FinishReason.LENGTH and asked is None):
                return _status(reply, finish)
            if turn + 1 == self.max_turns:
                break
            if not self.renderer.may_fit(reply.messages, self.max_model_tokens - transcript.length):
                break
            given_T = self._behind(reply, tools, after_stop=completion.tokens[-1] == self.renderer.end_of_turn)
            if transcript.length + len(given_T) >= self.max_model_tokens:  # no room for a single generated token
                break
            transcript.give(given_T, reply.messages)
        return Status.TRUNCATED

    def _completion(self, transcript: Transcript, finish: FinishReason) -> Completion:
        """Ends the open turn."""
        tokens_T, logprobs_T = transcript.turn()
        text = self.renderer.decode(tokens_T, self.sampling.stop_token_ids)
        transcript.end_turn(text, finish)
        return Completion(text, tuple(tokens_T.tolist()), finish, tuple(logprobs_T.tolist()))

    async def _generate(self, request_id: str, seed: int, transcript: Transcript, race: Race, asked: Asked | None) -> FinishReason:
        """Generates the open turn. After an abort from outside it goes on from the tokens so far."""
        limit, stop = self.sampling.max_new_tokens, self.sampling.stop
        if asked is not None:
            limit, stop = asked.max_new_tokens or limit, stop if asked.stop is None else asked.stop
        left = min(limit, self.max_model_tokens - transcript.length)
        stop_ids = tuple(dict.fromkeys((*self.sampling.stop_token_ids, *self.renderer.stop_token_ids)))
        drawn_by = stable_seed(seed, 0)  # a turn is one draw, however many requests it takes
        piece = 0
        while left:
            sampling = replace(self.sampling, max_new_tokens=left, stop=stop, stop_token_ids=stop_ids)
            name = f"{request_id}+{piece}" if piece else request_id
            routed = self.engine.routed_experts
            routes_from = None if routed is None else transcript.routed
            request = GenerateRequest(name, transcript.tokens(), sampling, drawn_by, routes_from)
            generation = checked_generation(await race.generate(request), request)
            transcript.generate(generation)
            if race.is_cut(generation):
                raise Cut
            if routed is not None:
                transcript.route(checked_experts(generation, request, routed))
            if generation.finish is not FinishReason.ABORT:
                return generation.finish
            left -= len(generation.tokens_T)
            piece += 1
        return FinishReason.LENGTH

    def _behind(self, reply: Reply, tools: Sequence[Mapping[str, Any]], *, after_stop: bool) -> NDArray[np.int32]:
        """What a reply puts between the completion and the next one."""
        if isinstance(reply, Asked):
            return np.asarray(reply.tokens, np.int32)
        try:
            return self.renderer.continuation(reply.messages, after_stop=after_stop, tools=tools)
        except DataError as error:  # the messages are the environment's
            raise EnvironmentFailure(f"the environment's reply cannot be rendered: {error}") from error

    def _imitated_turns(self, tokens_T: NDArray[np.int32], mask_T: NDArray[np.bool_]) -> tuple[Turn, ...]:
        """One turn for each run of imitated tokens, with the given tokens before it."""
        edges = [0, *(int(i) + 1 for i in np.flatnonzero(mask_T[1:] != mask_T[:-1])), len(mask_T)]
        given, imitated = list(pairwise(edges))[::2], list(pairwise(edges))[1::2]
        return tuple(
            Turn(start, begin, end, FinishReason.STOP, self.renderer.decode(tokens_T[begin:end]))
            for (start, _), (begin, end) in zip(given, imitated, strict=True)
        )


def _status(reply: Reply, finish: FinishReason) -> Status:
    """Of a trajectory that a reply or the limit of a generation ended."""
    truncated = reply.truncated if isinstance(reply, Ended) else None
    if truncated is None:
        truncated = finish is FinishReason.LENGTH
    return Status.TRUNCATED if truncated else Status.FINISHED
