"""Environments of verifiers: the library itself where it is installed, else a fake made from its protocol."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_agent_tools import call, with_tools
from tests.unit.test_roll import END, ids
from verst.errors import ExtensionError, RewardFailure
from verst.rewards.shipped import FromInfo
from verst.rollout.environments import check_machine, environment_factory
from verst.rollout.verifiers_agent import VERSION, rows
from verst.testing import FakeEngine
from verst.types import Message, Prompt, Status, Trajectory

ENV = "verifiers:tests.unit.sums_env:load_environment"
FAKE = str(Path(__file__).parent / "fake_verifiers")


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if importlib.util.find_spec("verifiers") is not None:
        yield
        return
    monkeypatch.syspath_prepend(FAKE)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "verifiers" or name == "tests.unit.sums_env"]:
        del sys.modules[name]


def prompt(number: int = 2) -> Prompt:
    row = list(rows(ENV.partition(":")[2]))[number]
    return Prompt(f"sums:{number}", tuple(Message(m["role"], m["content"]) for m in row.pop("prompt")), row)


async def rolled(*texts: str, cut: bool = False, reference: str = ENV, max_turns: int = 4, **options: Any) -> Trajectory:
    """A trajectory in which the model says these texts; `cut`: the last one to its limit of tokens."""
    factory = environment_factory(reference, options)
    try:
        await asyncio.to_thread(check_machine, factory)
        said = [[*ids(text), END] for text in texts]
        if cut:
            said[-1] = ids(texts[-1].ljust(400))
        roller = replace(with_tools(FakeEngine(said), factory), max_turns=max_turns)
        (trajectory,) = (await roller.roll(0, prompt())).trajectories
    finally:
        await factory.close()  # pyright: ignore
    return trajectory


def test_rows_of_its_data_set():
    before = signal.getsignal(signal.SIGTERM)
    found = list(rows("tests.unit.sums_env:load_environment", count=2))
    assert [row["answer"] for row in found] == ["0", "2"]
    assert found[1]["prompt"] == [{"role": "system", "content": "Use add."}, {"role": "user", "content": "1 + 1?"}]
    assert found[1]["info"] == {"i": 1}
    assert signal.getsignal(signal.SIGTERM) is before  # which the library takes for itself


async def test_a_rollout_with_a_tool_is_scored_by_the_rubric():
    trajectory = await rolled(call("add", a=2, b=2), "It is 4")
    assert (trajectory.status, trajectory.error) == (Status.FINISHED, None)
    assert [m.role for m in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert trajectory.messages[3].content == "4"
    info = trajectory.info
    assert (info["reward"], info["score/exact"], info["score/length"]) == (pytest.approx(1.3), 1.0, 3.0)
    assert (info["score/num_turns"], info["stop"]) == (2.0, "no_tools_called")


async def test_no_proxy_sees_its_calls(monkeypatch: pytest.MonkeyPatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    trajectory = await rolled("It is 4")
    assert (trajectory.status, trajectory.error) == (Status.FINISHED, None)


async def test_the_example_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples/agents"))
    trajectory = await rolled(call("add", a=2, b=2), "It is 4.", reference="verifiers:verifiers_sums", count=5)
    assert trajectory.info["score/right"] == 1


async def test_malformed_calls_and_tools_that_fail_are_the_environments_to_answer():
    assert (await rolled("<tool_call>{</tool_call>")).info["malformed_calls"] == 1
    trajectory = await rolled(call("add", a=2), call("gone"), "5")
    assert trajectory.status is Status.FINISHED
    assert "missing" in trajectory.messages[3].content
    assert trajectory.info["score/exact"] == 0


async def test_an_answer_that_was_cut_is_scored_too():
    trajectory = await rolled(call("add", a=2, b=2), "4 or 5 ", cut=True)
    assert trajectory.status is Status.TRUNCATED
    assert trajectory.info["score/exact"] == 1


async def test_one_that_the_run_ends_before_its_environment_has_no_reward():
    trajectory = await rolled(call("add", a=2, b=2), max_turns=1)
    assert trajectory.status is Status.TRUNCATED
    with pytest.raises(RewardFailure, match="reported no 'reward'"):
        FromInfo({"reward": 1})(trajectory, {})


@pytest.mark.parametrize(
    ("score", "reason"),
    [("breaks", "reward function breaks raised KeyError: 'no such thing'"), ("nan", "reward function nan returned nan")],
)
async def test_a_reward_function_that_fails_is_no_zero(score: str, reason: str):
    trajectory = await rolled("4", score=score)
    assert trajectory.status is Status.FAILED
    assert reason in str(trajectory.error)


async def test_an_error_of_the_environment_fails_its_trajectory_with_the_reason():
    trajectory = await rolled("")
    assert trajectory.status is Status.FAILED
    assert "EmptyModelResponseError: Model returned no content" in str(trajectory.error)


async def test_a_reward_function_that_computes_holds_up_nobody_else():
    async def longest_pause() -> float:
        pause, last = 0.0, time.monotonic()
        while not rolling.done():
            await asyncio.sleep(0.01)
            pause, last = max(pause, time.monotonic() - last), time.monotonic()
        return pause

    rolling = asyncio.ensure_future(rolled("4", score="slow"))
    assert await longest_pause() < 0.9
    assert (await rolling).info["score/slow"] == 1


async def test_one_that_hangs_costs_its_own_trajectory_and_its_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.rollout.user_loop.GRACE_S", 0.2)
    factory = environment_factory(ENV, {"score": "stuck"})
    await asyncio.to_thread(check_machine, factory)
    sums_env = sys.modules["tests.unit.sums_env"]  # an import from its package would find that of an earlier test
    engine = FakeEngine(lambda request: [*ids("hang" if request.id.startswith("0/") else "4"), END])
    roller = replace(with_tools(engine, factory), environment_deadline_s=2)  # in which a busy machine must get to the reward function
    try:
        (first,) = (await roller.roll(0, prompt())).trajectories
        assert "blocks its event loop in stuck" in str(first.error)
        assert sums_env.HELD.is_set()
        (second,) = (await replace(roller, environment_deadline_s=30).roll(1, prompt())).trajectories
        assert (second.error, second.info["score/stuck"]) == (None, 1.0)
    finally:
        sums_env.FREED.set()
        await factory.close()  # pyright: ignore


@pytest.mark.parametrize(
    ("reference", "options", "reason"),
    [
        ("tests.unit.sums_env:gone", {}, "has no 'gone'"),
        ("tests.unit.sums_env:no_environment", {}, r"is 5 of type int: the loader must return a verifiers\.Environment"),
        ("tests.unit.sums_env:fails", {}, "raised OSError: the disk is gone"),
        ("tests.unit.sums_env:load_environment", {"counts": 1}, "cannot be called as load_environment"),
        ("tests.unit.sums_env:load_environment", {"score": "together"}, "together scores the rollouts of a group together"),
        ("no-such-env", {}, "verifiers:no-such-env"),
    ],
)
def test_what_cannot_be_loaded_says_why(reference: str, options: dict[str, Any], reason: str):
    factory = environment_factory(f"verifiers:{reference}", options)
    with pytest.raises(ExtensionError, match=reason):
        check_machine(factory)


def test_another_version_or_none_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.0")
    with pytest.raises(ExtensionError, match=rf"0\.4\.0 is installed: pip install verifiers=={VERSION}"):
        environment_factory(ENV, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtensionError, match=rf"not installed: pip install verifiers=={VERSION}"):
        environment_factory(ENV, {})
