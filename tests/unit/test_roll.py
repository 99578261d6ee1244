"""Rolling groups: exact token arrays, stable seeds, and whose failure ends what."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from verst.data.chat import ChatRenderer
from verst.errors import DataError, DeadlineExceeded, EngineFailure, ModelError
from verst.fields import PerToken
from verst.observe.waits import Waits
from verst.rollout.clock import Clock
from verst.rollout.environments import SecondTry, SingleTurn
from verst.rollout.policy import stable_seed
from verst.rollout.roll import GroupRoller
from verst.testing import CHATML, FakeEngine, FakeEnvironment, tiny_tokenizer
from verst.types import NO_VERSION, Completion, FinishReason, Generation, Manifest, Message, Prompt, Reply, Sampling, Status, Turn

PROMPT = Prompt("p:0", (Message("user", "6x7?"),), {"answer": "42"})
MORE = Reply((Message("user", "more"),), done=False)
TOKENIZER: Any = tiny_tokenizer()
END: int = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def roller(engine: Any, environment: Any = SingleTurn, **changes: Any) -> GroupRoller:
    defaults: dict[str, Any] = {
        "sampling": Sampling(max_new_tokens=16),
        "group_size": 1,
        "max_turns": 1,
        "max_prompt_tokens": 64,
        "max_model_tokens": 256,
        "seed": 7,
        "environment_deadline_s": 5.0,
    }
    return GroupRoller(engine, ChatRenderer(TOKENIZER), environment, **(defaults | changes))


async def test_two_turns_are_exact_to_the_token():
    engine = FakeEngine([[*ids("41"), END], [*ids("42"), END]])
    (trajectory,) = (await roller(engine, SecondTry, max_turns=2).roll(3, PROMPT)).trajectories

    opening = ids("<|im_start|>user\n6x7?<|im_end|>\n<|im_start|>assistant\n")
    between = ids("\n<|im_start|>user\nThat is not correct. Try again.<|im_end|>\n<|im_start|>assistant\n")
    first, second = [*ids("41"), END], [*ids("42"), END]
    assert trajectory.tokens_T.tolist() == opening + first + between + second
    mask = [False] * len(opening) + [True] * 3 + [False] * len(between) + [True] * 3
    assert trajectory.loss_mask_T.tolist() == mask
    expected = [FakeEngine.logprob(t) if m else 0.0 for t, m in zip(trajectory.tokens_T, mask, strict=True)]
    assert trajectory.logprobs_T.tolist() == expected
    assert trajectory.versions_T.tolist() == [0 if m else NO_VERSION for m in mask]
    second_start = len(opening) + 3
    assert trajectory.turns == (
        Turn(0, len(opening), second_start, FinishReason.STOP, "41"),
        Turn(second_start, second_start + len(between), len(mask), FinishReason.STOP, "42"),
    )
    assert engine.requests[1].tokens_T.tolist() == opening + first + between
    assert [m.content for m in trajectory.messages] == ["6x7?", "41", "That is not correct. Try again.", "42"]
    assert (trajectory.id, trajectory.status, trajectory.completion) == ("3/0", Status.FINISHED, "42")
    assert trajectory.info == {"tries": 2, "solved": True}
    assert [a.dtype for a in (trajectory.tokens_T, trajectory.logprobs_T, trajectory.versions_T)] == [np.int32, np.float32, np.int32]


async def test_missing_end_of_turn_is_given_after_a_stop_string():
    engine = FakeEngine([ids("41!"), [*ids("42"), END]])
    (trajectory,) = (await roller(engine, SecondTry, max_turns=2).roll(0, PROMPT)).trajectories
    turn = trajectory.turns[1]
    assert TOKENIZER.decode(trajectory.tokens_T[turn.start : turn.generated]).startswith("<|im_end|>\n<|im_start|>user\n")
    assert not trajectory.loss_mask_T[turn.start : turn.generated].any()


async def test_members_are_rolled_at_once_in_order_with_their_own_environments():
    made: list[FakeEnvironment] = []

    def make() -> FakeEnvironment:
        made.append(FakeEnvironment())
        return made[-1]

    engine = FakeEngine(lambda request: [*ids(request.id), END], tick_s=0.001)
    group = await roller(engine, make, group_size=4).roll(5, PROMPT)
    assert [t.id for t in group.trajectories] == ["5/0", "5/1", "5/2", "5/3"]
    assert [t.completion for t in group.trajectories] == ["5/0/0", "5/1/0", "5/2/0", "5/3/0"]
    assert [kind for kind, _ in engine.events][:4] == ["generate"] * 4
    assert [len(e.calls) for e in made] == [3] * 4
    assert all(e.calls[0] is PROMPT and isinstance(e.calls[1], Completion) and e.calls[2] == "close" for e in made)
    assert group.timings["roll_s"] > 0


async def test_seeds_are_stable_and_all_different():
    engines = [FakeEngine([[*ids("41"), END]]) for _ in range(2)]
    for engine in engines:
        await roller(engine, SecondTry, group_size=3, max_turns=2).roll(9, PROMPT)
    seeds = {r.id: r.seed for r in engines[0].requests}
    assert seeds == {r.id: r.seed for r in engines[1].requests}
    assert len(set(seeds.values())) == len(seeds) == 6
    # Worked out apart, with coreutils: printf '7/9/0' | b2sum -l 64, little endian, shifted right by one.
    assert stable_seed(7, 9, 0) == int.from_bytes(bytes.fromhex("374917c76d330ee6"), "little") >> 1
    assert all(0 <= seed < 2**63 for seed in seeds.values())


async def test_engine_stops_at_the_template_end_of_turn():
    engine = FakeEngine([[END]])
    await roller(engine, sampling=Sampling(max_new_tokens=4, stop_token_ids=(5, END))).roll(0, PROMPT)
    assert engine.requests[0].sampling.stop_token_ids == (5, END)
    await roller(engine).roll(1, PROMPT)
    assert engine.requests[1].sampling.stop_token_ids == (END,)


async def test_a_length_limit_truncates_and_the_environment_still_speaks():
    engine = FakeEngine([ids("a long answer")])
    environment = partial(FakeEnvironment, [replace(MORE, info={"seen": True})])
    (trajectory,) = (await roller(engine, environment, sampling=Sampling(max_new_tokens=6), max_turns=3).roll(0, PROMPT)).trajectories
    assert (trajectory.status, trajectory.completion, trajectory.info) == (Status.TRUNCATED, "a long", {"seen": True})
    assert len(engine.requests) == 1


async def test_the_turn_limit_truncates():
    engine = FakeEngine([[*ids("41"), END]])
    (trajectory,) = (await roller(engine, partial(FakeEnvironment, [MORE] * 9), max_turns=2).roll(0, PROMPT)).trajectories
    assert (trajectory.status, len(trajectory.turns)) == (Status.TRUNCATED, 2)
    assert trajectory.loss_mask_T[-1]  # nothing is given that no one answers


async def test_the_context_limit_holds_across_turns():
    engine = FakeEngine([[*ids("41"), END], ids("x" * 16)])
    opening = len(ids("<|im_start|>user\n6x7?<|im_end|>\n<|im_start|>assistant\n"))
    between = len(ids("\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"))
    environment = partial(FakeEnvironment, [MORE] * 9)
    room = opening + 3 + between
    (full,) = (await roller(engine, environment, max_turns=5, max_model_tokens=room).roll(0, PROMPT)).trajectories
    assert (full.status, len(full.tokens_T), len(full.turns)) == (Status.TRUNCATED, opening + 3, 1)
    engine = FakeEngine([[*ids("41"), END], ids("x" * 16)])
    (cut,) = (await roller(engine, environment, max_turns=5, max_model_tokens=room + 4).roll(0, PROMPT)).trajectories
    assert (cut.status, len(cut.tokens_T), cut.turns[1].text) == (Status.TRUNCATED, room + 4, "xxxx")


class NoTensors:
    manifest = Manifest(3, "", (), "")

    def tensors(self):
        return iter(())

    def checksum(self, tensor):
        raise AssertionError("there is no tensor to hash")


async def test_a_weight_update_in_mid_generation_marks_each_token():
    engine = FakeEngine([[*ids("abcdefgh"), END]], tick_s=0.005)
    rolling = asyncio.create_task(roller(engine).roll(0, PROMPT))
    await engine.generated(2)
    await engine.pause()
    await engine.update_weights(NoTensors())
    await engine.resume()
    group = await rolling
    versions = group.trajectories[0].versions_T[group.trajectories[0].loss_mask_T].tolist()
    assert versions[:2] == [0, 0]
    assert versions[3:] == [3] * (len(versions) - 3)
    assert (group.admitted_version, group.oldest_version) == (0, 0)


async def test_an_aborted_turn_goes_on_from_its_tokens():
    plan = [*ids("abcdef"), END]
    opening = len(ids("<|im_start|>user\n6x7?<|im_end|>\n<|im_start|>assistant\n"))
    engine = FakeEngine(lambda request: plan[len(request.tokens_T) - opening :], tick_s=0.005)
    rolling = asyncio.create_task(roller(engine).roll(0, PROMPT))
    await engine.generated(2)
    await engine.abort()
    (trajectory,) = (await rolling).trajectories
    assert trajectory.tokens_T[trajectory.loss_mask_T].tolist() == plan
    assert (len(trajectory.turns), trajectory.status) == (1, Status.FINISHED)
    first, second = engine.requests
    assert (first.id, second.id) == ("0/0/0", "0/0/0+1")
    assert first.seed == second.seed  # a token's random numbers depend on its place too
    assert first.sampling.max_new_tokens + len(first.tokens_T) == second.sampling.max_new_tokens + len(second.tokens_T)


async def test_an_environment_failure_fails_only_its_trajectory():
    environments = iter(
        [FakeEnvironment(), FakeEnvironment([ValueError("bad board")]), FakeEnvironment([None]), FakeEnvironment(opening=())]
    )
    engine = FakeEngine([[*ids("hi"), END]])
    group = await roller(engine, lambda: next(environments), group_size=4).roll(0, PROMPT)
    good, raised, breach, empty = group.trajectories
    assert (good.status, good.error) == (Status.FINISHED, None)
    assert raised.status is breach.status is empty.status is Status.FAILED
    assert "FakeEnvironment: reply in turn 1 raised ValueError: bad board" in str(raised.error)
    assert "reply returned None" in str(breach.error)
    assert "returned no messages" in str(empty.error)
    assert raised.completion == "hi"
    assert len(empty.tokens_T) == 0
    assert group.trainable == (good,)


async def test_a_reply_the_template_refuses_is_the_environments_failure():
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}" + CHATML
    renderer = ChatRenderer(tiny_tokenizer(template))
    environment = partial(FakeEnvironment, [Reply((Message("tool", "7"),), done=False)])
    (trajectory,) = (await replace(roller(FakeEngine([[END]]), environment, max_turns=2), renderer=renderer).roll(0, PROMPT)).trajectories
    assert "reply cannot be rendered: the chat template refuses messages of the roles user, assistant, tool: no tools" in str(
        trajectory.error
    )


async def test_a_slow_environment_fails_at_its_deadline():
    engine = FakeEngine([[END]])
    make = partial(FakeEnvironment, delay_s=30)
    (trajectory,) = (await roller(engine, make, environment_deadline_s=0.02).roll(0, PROMPT)).trajectories
    assert trajectory.error == "environment FakeEnvironment: reply in turn 1 took longer than 0.02 s"


async def test_a_cancellation_inside_an_environment_is_its_failure():
    make = partial(FakeEnvironment, [asyncio.CancelledError()])
    (trajectory,) = (await roller(FakeEngine([[END]]), make).roll(0, PROMPT)).trajectories
    assert "reply in turn 1 awaited something that was cancelled" in str(trajectory.error)


async def test_a_failing_close_is_not_silent():
    class Unclosable(SingleTurn):
        async def close(self):
            raise OSError("socket gone")

    (trajectory,) = (await roller(FakeEngine([[END]]), Unclosable).roll(0, PROMPT)).trajectories
    assert trajectory.status is Status.FAILED
    assert "close raised OSError: socket gone" in str(trajectory.error)


async def test_an_engine_failure_ends_the_group_and_cancels_the_others():
    engine = FakeEngine([[*ids("hello"), END]], fail_at=1, tick_s=0.002)
    made: list[FakeEnvironment] = []

    def make() -> FakeEnvironment:
        made.append(FakeEnvironment())
        return made[-1]

    with pytest.raises(EngineFailure, match=r"told to fail at request 1 \(0/1/0\)"):
        await roller(engine, make, group_size=3).roll(0, PROMPT)
    assert engine.stats()["running"] == 0
    assert [e.calls[-1] for e in made] == ["close"] * 3


async def test_a_trajectory_that_its_deadline_finds_unfinished_fails_alone_and_keeps_what_it_has():
    engine = FakeEngine([[*ids("41"), END], [*ids("42"), END], [*ids("ab"), END]], stall_at=2)
    waits = Waits()
    chosen = replace(roller(engine, SecondTry, group_size=2, max_turns=2), engine_name="the engine of replica 4", waits=waits)
    good, stalled = (await chosen.roll(0, PROMPT, 0.1)).trajectories
    assert {good.status, stalled.status} == {Status.FINISHED, Status.FAILED}
    failed = stalled if stalled.status is Status.FAILED else good
    expected = "not finished after 0.1 s, waiting for the engine of replica 4: if that is too little time, raise rollout.deadline_s"
    assert failed.error == expected
    assert failed.completion == "41"  # its first turn
    assert not engine._running
    assert waits.now() == []


async def test_an_engine_that_processes_nothing_up_to_the_deadline_ends_the_group():
    class Dead(FakeEngine):
        async def generate(self, request: Any) -> Any:
            await asyncio.sleep(60)

    waits = Waits()
    chosen = replace(roller(Dead([[END]]), group_size=3), engine_name="the engine of replica 4", waits=waits)
    message = r"the engine of replica 4 processed no token for 0\.05 s, while trajectory 7/\d \(p:0\) waited for it"
    with pytest.raises(DeadlineExceeded, match=message):
        await chosen.roll(7, PROMPT, 0.05)
    assert {wait.awaited for wait in waits.now()} == {"the engine of replica 4"}  # for whoever tells why the run ended


async def test_an_engine_is_not_called_dead_by_counters_that_move_as_requests_end():
    class OneLongRequest(FakeEngine):
        """Generates all the time, and counts tokens once their request has ended."""

        live: dict[str, float]

        def stats(self) -> Any:
            return {"generated_tokens": 0.0, "server_generated_tokens": 0.0} | self.live

        async def _count(self) -> None:
            await super()._count()
            if self.live:
                self.live["processed_tokens"] += 1

    for live in ({}, {"processed_tokens": 0.0}):
        engine = OneLongRequest(lambda request: ids("a") * 16, tick_s=0.02)
        engine.live = live
        (late,) = (await roller(engine).roll(0, PROMPT, 0.1)).trajectories
        assert str(late.error).startswith("not finished after 0.1 s, waiting for the engine")


async def test_an_engine_that_was_asked_a_moment_before_the_deadline_is_not_blamed():
    class SlowToStart(SingleTurn):
        async def start(self, prompt: Prompt) -> Any:
            await asyncio.sleep(0.16)
            return prompt.messages

    (late,) = (await roller(FakeEngine([[END]], stall_at=0), SlowToStart).roll(0, PROMPT, 0.2)).trajectories
    assert str(late.error).startswith("not finished after 0.2 s, waiting for the engine")


async def test_deadlines_stand_still_while_the_engine_takes_a_version():
    engine, clock = FakeEngine([[*ids("42"), END]], tick_s=0.01), Clock()
    chosen = replace(roller(engine, group_size=2), clock=clock)
    await engine.pause()
    rolling = asyncio.create_task(chosen.roll(0, PROMPT, 0.2))
    await asyncio.sleep(0.05)
    clock.stop()
    await asyncio.sleep(0.3)  # one that takes longer than the deadline
    later = asyncio.create_task(chosen.roll(1, PROMPT, 0.2))  # which begins meanwhile
    await asyncio.sleep(0.3)
    clock.stop()
    await engine.resume()
    clock.go()
    for group in await asyncio.gather(rolling, later):
        assert [t.status for t in group.trajectories] == [Status.FINISHED] * 2
    assert not clock.limits


async def test_the_time_before_and_after_a_version_counts():
    engine, clock = FakeEngine([[*ids("42"), END]], stall_at=1), Clock()
    began = asyncio.get_running_loop().time()
    rolling = asyncio.create_task(replace(roller(engine, group_size=2), clock=clock).roll(0, PROMPT, 0.2))
    await asyncio.sleep(0.1)
    clock.stop()
    await asyncio.sleep(0.3)
    clock.go()
    statuses = {t.status for t in (await rolling).trajectories}
    assert statuses == {Status.FINISHED, Status.FAILED}
    assert 0.45 < asyncio.get_running_loop().time() - began < 0.6


async def test_an_environment_that_holds_a_group_up_to_its_deadline_is_not_the_engines_fault():
    chosen = roller(FakeEngine([[END]]), partial(FakeEnvironment, delay_s=30))
    (trajectory,) = (await chosen.roll(0, PROMPT, 0.05)).trajectories
    assert str(trajectory.error).startswith("not finished after 0.05 s, waiting for environment FakeEnvironment to reply")


async def test_cancelling_a_stalled_group_cancels_its_requests():
    engine = FakeEngine([[END]], stall_at=1)
    rolling = asyncio.create_task(roller(engine, group_size=2).roll(0, PROMPT))
    await engine.generated(1)
    await asyncio.sleep(0.05)
    assert engine.stats()["running"] == 1
    rolling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rolling
    assert engine.stats()["running"] == 0


def paced(lengths: list[int]) -> FakeEngine:
    """Member m of a group gets so many tokens and then its end of turn, one token a tick for all."""
    return FakeEngine(lambda request: [*ids("a") * lengths[int(request.id.split("/")[1])], END], tick_s=0.01)


async def test_the_last_to_end_are_cut_with_the_tokens_they_had():
    engine = paced([12, 2, 10, 3])
    group = await roller(engine, group_size=2, oversample=2).roll(5, PROMPT)
    assert [t.id for t in group.trajectories] == ["5/1", "5/3"]
    assert [t.status for t in group.trajectories] == [Status.FINISHED] * 2
    assert [t.generated_tokens for t in group.trajectories] == [3, 4]
    assert len(group.cut) == 2
    assert all(3 <= tokens <= 8 for tokens in group.cut)  # some ticks after the fourth token of 5/3, far from their ends at 11 and 13
    assert [event for event in engine.events if event[0] == "abort"] == [("abort", ("5/0/0", "5/2/0"))]
    assert engine.stats()["running"] == 0


async def test_failed_members_are_replaced_by_spare_ones():
    made = iter([FakeEnvironment(opening=RuntimeError("gone")), FakeEnvironment(), FakeEnvironment(), FakeEnvironment()])
    group = await roller(paced([1, 2, 3, 20]), lambda: next(made), group_size=2, oversample=2).roll(0, PROMPT)
    assert [(t.id, t.status) for t in group.trajectories] == [
        ("0/0", Status.FAILED),
        ("0/1", Status.FINISHED),
        ("0/2", Status.FINISHED),
    ]
    assert len(group.cut) == 1


async def test_a_group_with_too_few_that_end_well_ends_with_its_last():
    made = iter([FakeEnvironment(opening=RuntimeError("gone")) for _ in range(3)] + [FakeEnvironment()])
    group = await roller(paced([1, 1, 1, 9]), lambda: next(made), group_size=2, oversample=2).roll(0, PROMPT)
    assert [t.status for t in group.trajectories] == [Status.FAILED] * 3 + [Status.FINISHED]
    assert not group.cut


async def test_a_cut_ends_members_that_wait_for_their_environments():
    slow, hanging = FakeEnvironment(replies=[MORE], delay_s=30), FakeEnvironment(replies=[MORE], delay_s=30)
    made = iter([slow, FakeEnvironment(), hanging])
    engine = paced([1, 3, 2])
    began = time.perf_counter()
    group = await roller(engine, lambda: next(made), group_size=1, oversample=2, max_turns=2).roll(0, PROMPT)
    assert time.perf_counter() - began < 5
    assert [t.id for t in group.trajectories] == ["0/1"]
    assert group.cut == (2, 3)
    assert slow.calls[-1] == hanging.calls[-1] == "close"
    assert [request.id for request in engine.requests] == ["0/0/0", "0/1/0", "0/2/0"]


async def test_an_environment_that_breaks_as_it_is_cut_is_no_failure():
    class Breaking(FakeEnvironment):
        async def reply(self, completion: Completion) -> Reply:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                raise RuntimeError("broken off") from None
            return Reply()

    made = iter([Breaking(), FakeEnvironment()])
    group = await roller(paced([1, 3]), lambda: next(made), group_size=1, oversample=1).roll(0, PROMPT)
    assert [(t.id, t.status) for t in group.trajectories] == [("0/1", Status.FINISHED)]
    assert group.cut == (2,)


async def test_one_that_ends_when_enough_have_is_cut_too():
    engine = FakeEngine(lambda request: [*ids("a"), END])  # all in one turn of the event loop
    group = await roller(engine, group_size=2, oversample=2).roll(0, PROMPT)
    assert len(group.trajectories) == 2
    assert len(group.cut) == 2


async def test_an_abort_from_outside_cuts_nothing():
    engine = paced([8, 8])
    rolling = asyncio.create_task(roller(engine, group_size=1, oversample=1).roll(0, PROMPT))
    await engine.generated(2)
    await engine.abort()
    group = await rolling
    assert (len(group.trajectories), len(group.cut)) == (1, 1)
    assert group.trajectories[0].status is Status.FINISHED


GOOD = Generation("0/0/0", np.array([1, 2], np.int32), np.array([-1, -2], np.float32), np.array([0, 0], np.int32), FinishReason.STOP)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (replace(GOOD, logprobs_T=GOOD.logprobs_T[:1]), "different lengths"),
        (replace(GOOD, id="other"), "is for request other"),
        (replace(GOOD, logprobs_T=np.array([-1, np.nan], np.float32)), "not finite"),
        (replace(GOOD, versions_T=np.array([0, -1], np.int32)), "without a policy version"),
        (replace(GOOD, tokens_T=GOOD.tokens_T[:0], logprobs_T=GOOD.logprobs_T[:0], versions_T=GOOD.versions_T[:0]), "no tokens"),
        (replace(GOOD, **{n: np.zeros(17, np.int32) for n in ("tokens_T", "logprobs_T", "versions_T")}), "17 tokens, more than"),
    ],
)
async def test_an_engine_answer_that_breaks_the_protocol_is_an_engine_failure(bad, expected):
    class Broken(FakeEngine):
        async def generate(self, request):
            return bad

    with pytest.raises(EngineFailure, match=expected):
        await roller(Broken([])).roll(0, PROMPT)


async def test_a_prompt_that_is_too_long_is_named():
    with pytest.raises(DataError, match=r"prompt p:0 \('6x7\?'…\) has 23 tokens, above the limit of 8: raise data.max_prompt_tokens \(8\)"):
        await roller(FakeEngine([[END]]), max_prompt_tokens=8, group_size=2).roll(0, PROMPT)


class Opens(SingleTurn):
    """Each opens with other messages."""

    def __init__(self, openings: list[str]) -> None:
        self._openings = openings

    async def start(self, prompt: Prompt) -> Any:
        return (Message("user", self._openings.pop(0)),)


async def test_an_opening_that_an_environment_made_fails_its_own_trajectory():
    refusing = CHATML.replace("{% for", "{{ raise_exception('no ' + 'names') if 'Bob' in messages[0].content }}{% for", 1)
    made = partial(Opens, ["x" * 100, "x" * 10**8, "Bob", "fine"])
    rolling = replace(roller(FakeEngine([[END]] * 4), made, group_size=4), renderer=ChatRenderer(tiny_tokenizer(refusing)))
    *failed, fine = (await rolling.roll(0, PROMPT)).trajectories
    what = "the opening, which is not the prompt's messages, "
    raise_it = r"raise data.max_prompt_tokens"
    assert [t.error for t in failed] == [
        f"{what}has 119 tokens, where 1 to 64 can be: shorten it, or {raise_it} (64)",
        f"{what}cannot be rendered: 100000000 characters cannot be 64 tokens: {raise_it}",
        f"{what}cannot be rendered: the chat template refuses messages of the roles user: no names; change the messages or the template",
    ]
    assert fine.status is Status.FINISHED


class Logs(SingleTurn):
    """Goes on to write where it has told."""

    def __init__(self) -> None:
        self.log: list[Any] = ["begun"]
        self.worth = np.ones(1, np.float32)

    async def reply(self, completion: Completion) -> Reply:
        return Reply(info={"log": self.log, "worth": PerToken(self.worth)})

    async def close(self) -> None:
        self.log[:] = [object()]
        self.worth[:] = np.nan


async def test_what_an_environment_has_told_is_not_changed_by_what_it_does_then():
    (trajectory,) = (await roller(FakeEngine([[END]]), Logs).roll(0, PROMPT)).trajectories
    assert trajectory.info == {"log": ["begun"]}
    assert trajectory.fields == {"worth": PerToken([1.0])}


class Obstinate(SingleTurn):
    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


async def test_an_attribute_that_raises_is_its_own_trajectorys_failure():
    (trajectory,) = (await roller(FakeEngine([[END]]), Obstinate).roll(0, PROMPT)).trajectories
    assert trajectory.status is Status.FAILED
    assert "Obstinate: tools raised KeyError" in str(trajectory.error)


def test_several_turns_need_a_template_that_continues():
    upper = ChatRenderer(tiny_tokenizer(CHATML.replace("message['content'] }}", "message['content'] | upper }}")))
    one_turn = replace(roller(FakeEngine([])), renderer=upper)
    with pytest.raises(ModelError, match="changes or drops"):
        replace(one_turn, max_turns=2)


def test_demonstration_becomes_a_group():
    answers = (Message("assistant", "41"), Message("user", "No."), Message("assistant", "42"))
    group = roller(FakeEngine([])).demonstrate(4, replace(PROMPT, demonstration=answers))
    (trajectory,) = group.trajectories
    assert TOKENIZER.decode(trajectory.tokens_T[trajectory.loss_mask_T]) == "41<|im_end|>42<|im_end|>"
    assert [(t.text, t.finish) for t in trajectory.turns] == [("41", FinishReason.STOP), ("42", FinishReason.STOP)]
    for turn in trajectory.turns:
        assert not trajectory.loss_mask_T[turn.start : turn.generated].any()
        assert trajectory.loss_mask_T[turn.generated : turn.end].all()
    assert trajectory.turns[-1].end == len(trajectory.tokens_T)
    assert set(trajectory.versions_T.tolist()) == {NO_VERSION}
    assert not trajectory.logprobs_T.any()
    assert (trajectory.id, trajectory.status, trajectory.reward) == ("4/0", Status.FINISHED, 0.0)
    assert trajectory.messages == (*PROMPT.messages, *answers)


def test_demonstration_errors_name_prompt_and_option():
    answer = replace(PROMPT, demonstration=(Message("assistant", "42" * 50),))
    with pytest.raises(DataError, match=r"prompt p:0 has no demonstration.*data\.columns=\{demonstration: COLUMN\}"):
        roller(FakeEngine([])).demonstrate(0, PROMPT)
    with pytest.raises(DataError, match=r"raise data\.max_prompt_tokens \(8\)"):
        roller(FakeEngine([]), max_prompt_tokens=8).demonstrate(0, answer)
    with pytest.raises(DataError, match=r"has 124 tokens, above the limit of a trajectory \(100\)"):
        roller(FakeEngine([]), max_model_tokens=100).demonstrate(0, answer)


async def test_a_reply_of_a_hundred_megabytes_is_not_tokenized():
    text = "x" * 100_000_000

    class Prints(SingleTurn):
        async def reply(self, completion: Completion) -> Reply:
            return Reply((Message("tool", text),), done=False, info={"seen": True})

    engine = FakeEngine([[*ids("41"), END]])
    started = time.monotonic()
    (trajectory,) = (await roller(engine, Prints, max_turns=2).roll(0, PROMPT)).trajectories
    assert (trajectory.status, trajectory.info) == (Status.TRUNCATED, {"seen": True})
    assert time.monotonic() - started < 5  # to tokenize it takes minutes
    assert len(engine.requests) == 1
    assert [m.role for m in trajectory.messages] == ["user", "assistant"]


def test_what_may_fit_is_never_called_too_long():
    renderer = ChatRenderer(TOKENIZER)
    for text in ("", "x" * 50, " " * 5000, "é" * 20):
        messages = [Message("user", text)]
        assert renderer.may_fit(messages, len(renderer.continuation(messages, last=renderer.end_of_turn)))
