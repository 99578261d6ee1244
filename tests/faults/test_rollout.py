"""Whole runs in which generation, an environment or scoring stands still: what is bounded, named, counted and replaced."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_run, stopped_after
from verst.errors import DeadlineExceeded
from verst.journal.log import JournalReader
from verst.rollout.hf.decoder import Decoder
from verst.rollout.hf.engine import HFEngine
from verst.rollout.recorded import Piece
from verst.rollout.roll import GroupRoller
from verst.runtime import salvage
from verst.runtime.replica import Replica
from verst.runtime.salvage import Salvage
from verst.types import Completion, GenerateRequest, Generation, Group, Message, Prompt, Reply, Status

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_one_thread")]

ROWS = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]
LIMIT_S = 4.0  # much longer than anything takes here on a busy machine
STALLED = f"not finished after {LIMIT_S:g} s, waiting for the engine of replica 0: if that is too little time, raise rollout.deadline_s"


def spread(trajectory: Any, fields: Any) -> float:
    """Varies between the members of a group, so that every step has a gradient."""
    return float(sum(map(ord, trajectory.completion)) % 7)


def run_of(directory: Path, model: Path, scored_by: Any = spread, environment: Any = None, **values: dict[str, Any]) -> LocalRun:
    """Three steps of four groups that may run ahead; a group has `LIMIT_S`, and any of the first eight may be passed."""
    base = {
        "data": {"max_prompt_tokens": 64, "shuffle": False},
        "rollout": {
            "group_size": 4,
            "max_new_tokens": 6,
            "max_running": 64,
            "deadline_s": LIMIT_S,
            "capacity_groups": 8,
            "window_groups": 8,
        },
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
    }
    merged = {k: base.get(k, {}) | values.get(k, {}) for k in base | values}
    return local_run(directory, model, merged, reward=scored_by, prompts=ROWS, environment=environment)


@pytest.fixture
def stall(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], bool]], list[str]]:
    """Makes the engine never answer those requests that are chosen by their ids. Returns the list of those that were cancelled."""

    def make(chosen: Callable[[str], bool]) -> list[str]:
        generate, cancelled = HFEngine.generate, list[str]()

        async def stalling(self: HFEngine, request: GenerateRequest) -> Generation:
            if not chosen(request.id):
                return await generate(self, request)
            try:
                return await asyncio.Event().wait()  # type: ignore[return-value]
            except asyncio.CancelledError:
                cancelled.append(request.id)
                raise

        monkeypatch.setattr(HFEngine, "generate", stalling)
        return cancelled

    return make


def group_of(request_id: str) -> int:
    return int(request_id.split("/")[0])


async def test_a_trajectory_that_never_ends_fails_alone(tmp_path: Path, model: Path, stall: Any):
    cancelled = stall(lambda request: request == "1/2/0")
    run = await run_of(tmp_path, model).go()
    assert cancelled == ["1/2/0"]
    group = JournalReader(run.run.journal).group(1)
    assert [t.status is Status.FAILED for t in group.trajectories] == [False, False, True, False]
    assert group.trajectories[2].error == STALLED
    assert all(t.reward is not None for t in group.trainable)
    assert {STALLED: 1} in [row.get("failures") for row in run.rows]
    assert sum(run.metric("groups/dropped")) == 0


async def test_a_group_that_never_ends_is_dropped_and_replaced(tmp_path: Path, model: Path, stall: Any):
    cancelled = stall(lambda request: group_of(request) == 1)
    run = await run_of(tmp_path, model).go()
    assert len(cancelled) == 4
    reader = JournalReader(run.run.journal)
    trained = [seq for step in (1, 2, 3) for seq in reader.batch(step).groups]
    assert 1 not in trained
    assert len(set(trained)) == 12
    assert [seq for step in (1, 2, 3) for seq in reader.batch(step).dropped] == [1]
    assert sum(run.metric("groups/dropped")) == 1
    assert any(f"group 1 (rows:1) dropped: 4 of 4 trajectories failed: not finished after {LIMIT_S:g} s" in line for line in run.lines)


async def test_engines_that_do_nothing_are_replaced_until_it_must_be_the_group(tmp_path: Path, model: Path, stall: Any):
    stall(lambda request: group_of(request) >= 4)
    run = run_of(tmp_path, model, rollout={"capacity_groups": 6})
    with pytest.raises(DeadlineExceeded) as ended:
        await run.go()
    assert sum("dropped" in line for line in run.lines) <= 2  # those that it had begun with; not too many in a row
    first, *standing = str(ended.value).splitlines()
    assert re.match(
        r"group \d+ \(rows:\d+\) was on 3 replicas that were lost; the last: the engine of replica 2 processed no token for 4 s, while "
        r"trajectory \d+/\d \(rows:\d+\) waited for it$",
        first,
    )
    assert sum("takes the place of replica" in line for line in run.lines) == 2
    assert standing[0] == "who waits for whom:"
    assert any(line.startswith("  the loop waits for the next of 4 groups (0 are ready)") for line in standing)
    assert any("  the feed waits for a free slot" in line for line in standing)
    assert any("groups wait for the engine of replica 2" in line for line in standing)
    assert standing[-1] == f"what each process did then: {max(run.run.logs.glob('stacks-*-a-deadline-passed.txt'))}"
    assert any("stalling (test_rollout.py:" in stacks.read_text() for stacks in run.run.logs.glob("stacks-*")), "before one was ended"
    assert "who waits for whom:" in run.run.log.read_text()
    assert JournalReader(run.run.journal).index.last_commit == 1


async def test_of_two_replicas_the_one_that_stands_still_is_named_and_replaced(tmp_path: Path, model: Path, stall: Any):
    stalled = set[str]()

    def first_time(request: str) -> bool:
        """Of the first eight groups, which go to one and the other in turn, those of replica 1; not when they are rolled again."""
        new = group_of(request) in (1, 3, 5, 7) and request not in stalled
        stalled.add(request)
        return new

    stall(first_time)
    run = await run_of(tmp_path, model, rollout={"replicas": 2}, run={"name": "run", "dir": str(tmp_path), "steps": 4, "seed": 1}).go()
    (lost,) = [line for line in run.lines if "was lost" in line]
    assert re.match(r"replica 1 was lost after step \d with 4 group\(s\) in flight, which are rolled again: the engine of replica 1 ", lost)
    assert run.metric("rollout/failed") == [0, 0, 0, 0]


async def test_tokens_of_a_lost_replica_are_kept_and_the_weights_are_those_of_an_undisturbed_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    rollout = {"replicas": 2, "group_size": 4, "max_new_tokens": 32, "max_running": 64}
    values: dict[str, Any] = {"data": {"max_prompt_tokens": 64, "shuffle": False}, "rollout": rollout}
    undisturbed = await local_run(tmp_path / "undisturbed", model, values, reward=spread, prompts=ROWS).go()
    monkeypatch.setattr(salvage, "EVERY_S", 0.01)
    step, add, on = Decoder.step, Salvage.add, Salvage.begin
    kept: list[int] = []
    lost = set[int]()

    def begin(self: Salvage, seq: int, replica: Replica) -> list[Piece]:
        if replica.number == 1 and seq >= 4:
            lost.add(seq)
        return on(self, seq, replica)

    def add_and_count(self: Salvage, news: Any) -> None:
        add(self, news)
        kept.append(sum(len(piece.generation.tokens_T) for seq in lost for piece in self._pieces.get(seq, {}).values()))

    def slow_and_breaking(self: Decoder) -> Any:
        time.sleep(0.01)  # 32 tokens take longer than it takes to ask for them
        mine = {group_of(request.id) for request in self._table.requests if request is not None}
        if mine & lost and kept and kept[-1] >= 40 and len(broken) == 0:
            broken.append(kept[-1])
            raise ZeroDivisionError("a defect")
        return step(self)

    broken: list[int] = []
    monkeypatch.setattr(Salvage, "begin", begin)
    monkeypatch.setattr(Salvage, "add", add_and_count)
    monkeypatch.setattr(Decoder, "step", slow_and_breaking)
    run = await local_run(tmp_path / "disturbed", model, values, reward=spread, prompts=ROWS).go()
    (line,) = [line for line in run.lines if "was lost" in line]
    said = r"replica 1 was lost after step \d with \d group\(s\) in flight, which are rolled again from (\d+) tokens that are kept: "
    found = re.match(said, line)
    assert found is not None, line
    assert int(found[1]) >= 40
    for seq in range(12):
        one, other = (JournalReader(r.run.journal).group(seq).trajectories for r in (undisturbed, run))
        assert [(t.tokens_T.tolist(), t.logprobs_T.tolist()) for t in one] == [(t.tokens_T.tolist(), t.logprobs_T.tolist()) for t in other]
    digests = [[JournalReader(r.run.journal).commit(step).digest for step in (1, 2, 3)] for r in (undisturbed, run)]
    assert digests[0] == digests[1]


async def test_a_failed_group_is_not_rolled_again_by_a_resumed_run(tmp_path: Path, model: Path, stall: Any):
    asked: list[str] = []

    def chosen(request: str) -> bool:
        asked.append(request)
        return group_of(request) == 1

    stall(chosen)
    run = run_of(tmp_path, model, rollout={"window_groups": 1})
    await stopped_after(run, 1)
    journaled = set(JournalReader(run.run.journal).index.groups)
    assert {0, 1, 2, 3, 4} <= journaled
    assert run.rows[0]["failures"] == {STALLED: 4}
    asked.clear()
    await run.go()
    assert not {group_of(request) for request in asked} & journaled
    assert JournalReader(run.run.journal).batch(1).dropped == {1: f"4 of 4 trajectories failed: {STALLED}"}


async def test_a_held_out_prompt_that_never_ends_counts_as_failed(tmp_path: Path, model: Path, stall: Any):
    stall(lambda request: group_of(request) == -1)
    values = {"data": {"max_prompt_tokens": 64, "holdout": 0.3}, "eval": {"every_steps": 3, "prompts": 4}}
    run = await run_of(tmp_path, model, **values).go()
    assert run.metric("eval/failed") == [0.25, 0.25]
    assert len(run.metric("eval/reward")) == 2


class Deaf:
    """For the second prompt it swallows what cancels it at the limits of call and group, as code with an `except` too broad does."""

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        self._deaf = prompt.id == "rows:1"
        return prompt.messages

    async def reply(self, completion: Completion) -> Reply:
        for _ in range(2 * self._deaf):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
        await asyncio.sleep(60 * self._deaf)
        return Reply()


async def test_one_that_swallows_its_cancellation_fails_at_its_limit(tmp_path: Path, model: Path):
    run = await run_of(tmp_path, model, environment=Deaf, run={"name": "run", "dir": str(tmp_path), "steps": 4, "seed": 1}).go()
    reader = JournalReader(run.run.journal)
    assert {(t.error or "").partition(":")[0] for t in reader.group(1).trajectories} == {
        f"not finished after 4 s, waiting for environment {Deaf.__name__} to reply"
    }
    assert [seq for step in (1, 2, 3, 4) for seq in reader.batch(step).dropped] == [1]


def outlast(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[Prompt], bool]) -> None:
    """Chosen groups heed no limit of theirs, as if their replica had a defect. The loop's own limit is 8 s."""
    roll = GroupRoller.roll

    async def deaf(self: GroupRoller, seq: int, prompt: Prompt, *rest: Any) -> Group:
        if chosen(prompt):
            self.waits.begin(f"{seq}/0", "nothing")
            await asyncio.sleep(60)
        return await roll(self, seq, prompt, *rest)

    monkeypatch.setattr(GroupRoller, "roll", deaf)
    monkeypatch.setattr("verst.runtime.pools.group_deadline_s", lambda *args, **kwargs: 2 * LIMIT_S)


async def test_a_group_that_outlasts_all_limits_is_taken_back_from_its_replica(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    outlast(monkeypatch, lambda prompt: prompt.id == "rows:1")
    run = await run_of(tmp_path, model, run={"name": "run", "dir": str(tmp_path), "steps": 4, "seed": 1}).go()
    reader = JournalReader(run.run.journal)
    assert [t.error for t in reader.group(1).trajectories] == ["waited 8 s for nothing on replica 0"] * 4
    assert [seq for step in (1, 2, 3, 4) for seq in reader.batch(step).dropped] == [1]


async def test_if_no_group_comes_back_at_all_the_run_ends(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    outlast(monkeypatch, lambda prompt: True)
    run = run_of(tmp_path, model)
    with pytest.raises(
        DeadlineExceeded,
        match=r"group \d .* was on 3 replicas .*: waited 8 s for nothing on replica 2: .*, and no other came back",
    ) as e:
        await asyncio.wait_for(run.go(), 60)
    assert re.search(r"groups? waits? for ", str(e.value))
    assert "8 of 8 group slots are held" in str(e.value)


async def test_a_slow_tool_delays_only_its_trajectory(tmp_path: Path, model: Path):
    """Its limit fails it; all others of its group are trained."""

    class Tool(Deaf):
        made = 0

        async def start(self, prompt: Prompt) -> Sequence[Message]:
            Tool.made += 1
            self._deaf = Tool.made == 6
            return prompt.messages

        async def reply(self, completion: Completion) -> Reply:
            await asyncio.sleep(60 * self._deaf)
            return Reply()

    run = await run_of(tmp_path, model, environment=Tool).go()
    groups = [JournalReader(run.run.journal).group(seq) for seq in range(4)]
    (failed,) = [t for g in groups for t in g.trajectories if t.status is Status.FAILED]
    assert re.search(r"not finished after 4 s, waiting for environment .*Tool to reply", str(failed.error))
    assert sum(run.metric("groups/dropped")) == 0
