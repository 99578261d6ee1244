"""Tokens of groups in flight outlive the replica that generated them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.loop.fakes import group
from tests.unit.test_pools import PROMPT as POOLED
from tests.unit.test_pools import replicas
from tests.unit.test_roll import END, MORE, PROMPT, TOKENIZER, ids, roller
from verst.config.schema import Config
from verst.data.chat import ChatRenderer
from verst.journal.codec import decode_group, encode_group
from verst.rollout.environments import SecondTry, SingleTurn
from verst.rollout.recorded import Piece, Recorded
from verst.runtime import salvage
from verst.runtime.actors import LocalWorker, WorkerDied
from verst.runtime.extensions import Extensions
from verst.runtime.rollout_worker import RolloutWorker
from verst.testing import FakeEngine, FakeEnvironment
from verst.types import FinishReason, GenerateRequest, Generation, Group, Message, Reply, RoutedExperts

OPENING = len(ids("<|im_start|>user\n6x7?<|im_end|>\n<|im_start|>assistant\n"))
ANSWER = [*ids("forty-two"), END]


def planned(request: GenerateRequest) -> list[int]:
    """The answer, from where the request goes on."""
    return ANSWER[len(request.tokens_T) - OPENING :]


async def lost(engine: FakeEngine, recorded: Recorded, tokens: int, **options: Any) -> list[Piece]:
    """What is known of a group whose engine is lost when it has generated so many tokens in all."""
    rolling = asyncio.create_task(roller(engine, **options).roll(0, PROMPT, recorded=recorded))
    await engine.generated(tokens)
    found = recorded.news({generation.id: generation for generation in await engine.in_flight()})
    rolling.cancel()
    await asyncio.wait({rolling})
    return found


async def test_a_group_goes_on_from_the_tokens_that_another_replica_generated():
    first, second = FakeEngine(planned, tick_s=0.01), FakeEngine(planned)
    second._version = 1
    known = await lost(first, Recorded(first), 8, group_size=2)
    assert {piece.generation.id for piece in known} == {"0/0/0", "0/1/0"}
    assert {piece.generation.finish for piece in known} == {FinishReason.ABORT}
    rolled = await roller(second, group_size=2).roll(0, PROMPT, recorded=Recorded(second, known))
    had = {piece.generation.id: len(piece.generation.tokens_T) for piece in known}
    for member, trajectory in enumerate(rolled.trajectories):
        assert trajectory.tokens_T[trajectory.loss_mask_T].tolist() == ANSWER
        versions = trajectory.versions_T[trajectory.loss_mask_T].tolist()
        assert versions == [0] * had[f"0/{member}/0"] + [1] * (len(ANSWER) - had[f"0/{member}/0"])
        assert len(trajectory.turns) == 1
    assert [request.id for request in second.requests] == ["0/0/0+1", "0/1/0+1"]
    assert [len(request.tokens_T) - OPENING for request in second.requests] == list(had.values())


async def test_finished_members_and_turns_are_not_generated_again_and_their_environments_see_the_same():
    first, second = FakeEngine([[*ids("41"), END]]), FakeEngine([[*ids("42"), END]])
    stalled = FakeEngine([[*ids("41"), END], [*ids("40"), END]], stall_at=1)
    known = await lost(stalled, Recorded(stalled), 3, environment=SecondTry, max_turns=2)
    (trajectory,) = (await roller(second, SecondTry, max_turns=2).roll(0, PROMPT, recorded=Recorded(second, known))).trajectories
    assert [message.content for message in trajectory.messages] == ["6x7?", "41", "That is not correct. Try again.", "42"]
    assert trajectory.info == {"tries": 2, "solved": True}
    assert [request.id for request in second.requests] == ["0/0/1"]
    assert not first.requests


async def test_an_environment_that_answers_otherwise_is_asked_anew():
    first, second = FakeEngine([[*ids("41"), END], [*ids("40"), END]], stall_at=2), FakeEngine([[*ids("42"), END]])
    scripts = iter([[MORE, MORE], [Reply((Message("user", "something else"),), done=False), Reply()]])

    def environment() -> FakeEnvironment:
        return FakeEnvironment(next(scripts))

    known = await lost(first, Recorded(first), 6, environment=environment, max_turns=3)
    assert [piece.generation.id for piece in known] == ["0/0/0", "0/0/1"]
    rolled = await roller(second, environment, max_turns=3).roll(0, PROMPT, recorded=Recorded(second, known))
    assert [message.content for message in rolled.trajectories[0].messages] == ["6x7?", "41", "something else", "42"]
    assert [request.id for request in second.requests] == ["0/0/1"]


async def test_routes_stay_with_the_tokens_that_they_sampled():
    first, second = FakeEngine(planned, tick_s=0.01), FakeEngine(planned)
    first.routed_experts = second.routed_experts = kind = RoutedExperts(2, 8, 2)
    known = await lost(first, Recorded(first), 5)
    (trajectory,) = (await roller(second).roll(0, PROMPT, recorded=Recorded(second, known))).trajectories
    had = OPENING + len(known[0].generation.tokens_T)
    assert trajectory.routes is not None
    places = range(len(trajectory.tokens_T) - 1)
    expected = np.stack([FakeEngine.experts(place, 0, kind) for place in places])  # both engines count their requests from 0
    assert 1 < had - OPENING < len(ANSWER)
    np.testing.assert_array_equal(trajectory.routes.experts_TLK, expected)


async def test_each_token_is_told_once_and_another_loop_is_told_all():
    engine = FakeEngine(planned, tick_s=0.01)
    recorded = Recorded(engine)
    rolling = asyncio.create_task(roller(engine, group_size=2).roll(0, PROMPT, recorded=recorded))

    async def so_far() -> dict[str, Generation]:
        return {generation.id: generation for generation in await engine.in_flight()}

    await engine.generated(4)
    early = recorded.news(await so_far())
    assert recorded.news({piece.generation.id: piece.generation for piece in early}) == []
    await rolling
    late = recorded.news(await so_far())
    assert [piece.generation.tokens_T.tolist() for piece in late] == [ANSWER, ANSWER]
    assert recorded.news(await so_far()) == []
    assert [piece.generation.tokens_T.tolist() for piece in recorded.all({})] == [ANSWER, ANSWER]
    told_before = Recorded(engine, late)
    assert told_before.news({}) == []
    assert len(told_before.all({})) == 2


class Scores:
    async def score(self, rolled: Group) -> Group:
        return rolled


def replica(number: int, engine: FakeEngine, config: Config) -> LocalWorker:
    worker = RolloutWorker(config, Extensions(), number, "cpu", Path("unused"))
    worker.engine, worker._renderer, worker._environment = engine, ChatRenderer(TOKENIZER), SingleTurn
    worker._rollers, worker._scorer = {"policy": worker._roller()}, cast(Any, Scores())
    return LocalWorker(f"replica {number}", worker)


async def test_what_a_lost_replica_had_goes_to_the_next(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(salvage, "EVERY_S", 0.01)
    config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "rollout": {"group_size": 2, "max_new_tokens": 16}})
    first, second = FakeEngine(planned, tick_s=0.05), FakeEngine(planned)
    both = replicas(cast(Any, replica(0, first, config)), cast(Any, replica(1, second, config)), group_size=2)
    asking = asyncio.create_task(both.salvage.run())
    rolling = asyncio.create_task(both.roll(0, PROMPT, "policy"))
    await first.generated(6)
    (serving, _) = both.active
    while both.salvage.tokens(serving) < 6:  # noqa: ASYNC110 - it is asked every 10 ms
        await asyncio.sleep(0.01)
    both.lose(serving, WorkerDied("replica 0 died"))
    encoded, rolled = await asyncio.wait_for(rolling, 5)
    assert (serving.had, serving.salvaged >= 6) == (1, True)
    assert [t.tokens_T[t.loss_mask_T].tolist() for t in decode_group(encoded).trajectories] == [ANSWER, ANSWER]
    assert sum(request.id.endswith("+1") for request in second.requests) == 2
    assert sum(len(request.tokens_T) - OPENING for request in second.requests) == serving.salvaged
    assert both.salvage.begin(0, serving) == [], "nothing is kept of a group that has come back"
    asking.cancel()
    assert rolled.seq == 0


async def test_a_replica_that_does_not_answer_holds_up_no_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(salvage, "EVERY_S", 0.01)

    class Silent(LocalWorker):
        asked = 0

        async def post(self, method: str, /, *args: Any) -> Any:
            if method == "news":
                self.asked += 1
                if self.asked == 2:
                    raise WorkerDied("replica 0 died")
                return {}
            await asyncio.sleep(0.2)
            return encode_group(group(args[0], 0))

    silent = Silent("replica 0", None)
    one = replicas(cast(Any, silent))
    asking = asyncio.create_task(one.salvage.run())
    await asyncio.wait_for(one.roll(0, POOLED, "policy"), 5)
    assert silent.asked > 2, "an answer that did not come is not the last question"
    assert not asking.done()
    asking.cancel()
