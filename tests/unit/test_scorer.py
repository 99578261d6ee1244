import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import lives
from verst.config.schema import RewardConfig
from verst.errors import ExtensionError, RewardFailure
from verst.isolated.process import worker_environment
from verst.rewards.process import RewardProcess
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.rewards.together import AT_ONCE
from verst.types import FinishReason, Group, Message, Prompt, Status, Trajectory, Turn

REWARDS = '''
import asyncio, ctypes, os, signal, subprocess, sys, threading, time

def by_text(trajectory, fields):
    """Does what the completion says."""
    text = trajectory.completion
    print("scoring", text)                          # must not reach the protocol
    os.write(1, b"raw output\\n")
    if text == "raise": raise ValueError("no such answer")
    if text == "exit": os._exit(3)
    if text == "sys.exit": sys.exit(4)
    if text == "segfault": ctypes.string_at(0)
    if text == "sleep": time.sleep(60)
    if text == "spin":
        while True: pass
    if text == "main thread": return threading.current_thread() is threading.main_thread()
    if text == "pid": return os.getpid()
    if text == "secret": return "MY_API_KEY" in os.environ
    if text == "spawn": return subprocess.Popen(["sleep", "60"]).pid
    return {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1", "true": True}.get(text, 0.5)

async def async_by_text(trajectory, fields):
    text = trajectory.completion
    if text == "exit": os._exit(3)
    if text == "block": time.sleep(60)
    if text == "hang": await asyncio.sleep(60)
    if text == "raise": raise TimeoutError("judge said no")
    if text == "sys.exit": sys.exit(4)
    if text == "cancel": asyncio.current_task().cancel()
    await asyncio.sleep(0.1)
    return 1

def of_group(trajectories, fields):
    texts = [t.completion for t in trajectories]
    print("scoring", texts)
    for text in texts:
        if text == "raise": raise ValueError("no such group")
        if text == "exit": os._exit(3)
        if text == "sleep": time.sleep(60)
        if text == "kill once" and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    if "fewer" in texts: return [1.0]
    if "pid" in texts: return [os.getpid()] * len(texts)
    return [float("nan") if text == "nan" else len(texts) + place for place, text in enumerate(texts)]

async def async_of_group(trajectories, fields):
    await asyncio.sleep(0.01)
    return of_group(trajectories, fields)

def takes(trajectory, fields):
    fields["seen"].append(trajectory.completion)
    return len(fields["seen"]) + len(fields.pop("answer"))

async def async_takes(trajectory, fields):
    return takes(trajectory, fields)

class Broken:
    def __init__(self): raise RuntimeError("no weights")
'''


def trajectory(member: int, text: str) -> Trajectory:
    arrays = np.zeros(3, np.int32), np.ones(3, np.bool_), np.zeros(3, np.float32), np.zeros(3, np.int32)
    return Trajectory(f"7/{member}", *arrays, (Turn(0, 0, 3, FinishReason.STOP, text),), (), Status.FINISHED, 0)


def group(*texts: str) -> Group:
    prompt = Prompt("rows:0", (Message("user", "?"),), {"answer": "42"})
    return Group(7, prompt, tuple(trajectory(i, text) for i, text in enumerate(texts)), 0)


@pytest.fixture
def rewards(tmp_path, monkeypatch) -> Path:
    """A directory with the module `user_rewards`, as the current directory."""
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
async def scorer(rewards):
    scorer = Scorer(RewardSpec("user_rewards:by_text"), workers=1, deadline_s=1, log=rewards / "log")
    await scorer.start()
    yield scorer
    scorer.close()


async def ends(pid: int) -> bool:
    """Whether the process is gone within 5 s."""
    for _ in range(250):
        if not lives(pid):
            return True
        await asyncio.sleep(0.02)
    return False


@pytest.mark.parametrize("name", ["takes", "async_takes"])
async def test_what_a_reward_changes_in_the_fields_is_not_seen_by_its_next_call(rewards, name: str):
    scorer = Scorer(RewardSpec(f"user_rewards:{name}"), workers=1, deadline_s=5)
    await scorer.start()
    asked = replace(group("a", "b", "c"), prompt=Prompt("rows:0", (Message("user", "?"),), {"answer": "42", "seen": []}))
    assert [t.reward for t in (await scorer.score(asked)).trajectories] == [3, 3, 3]
    assert asked.prompt.fields == {"answer": "42", "seen": []}
    scorer.close()


@pytest.mark.slow
async def test_each_failure_is_attributed_to_its_trajectory(scorer, rewards):
    texts = ["ok", "raise", "nan", "inf", "none", "text", "true", "exit", "sys.exit", "segfault", "ok", "sleep", "ok"]
    scored = await scorer.score(group(*texts))
    assert [t.id for t in scored.trajectories] == [f"7/{i}" for i in range(len(texts))]
    assert [t.reward for t in scored.trajectories] == [0.5, None, None, None, None, None, 1.0, None, None, None, 0.5, None, 0.5]
    errors = {text: t.error for text, t in zip(texts, scored.trajectories, strict=True) if t.status is Status.FAILED}
    name = "reward user_rewards:by_text"
    assert errors["raise"].startswith(f"{name} raised ValueError: no such answer ({rewards}/user_rewards.py:9: ")
    assert errors["nan"] == f"{name} returned nan, not a finite number: return one"
    assert errors["inf"] == f"{name} returned inf, not a finite number: return one"
    assert errors["none"] == f"{name} returned None of type NoneType, not a number: return one"
    assert errors["text"] == f"{name} returned '1' of type str, not a number: return one"
    assert errors["exit"] == f"{name} broke: its process ended with exit code 3; what it printed is in {rewards}/log"
    assert errors["sys.exit"].startswith(f"{name} broke: its process ended with exit code 4")
    assert errors["segfault"].startswith(f"{name} broke: its process was killed by SIGSEGV")
    assert errors["sleep"] == f"{name} exceeded 1 s: make it faster, or raise reward.deadline_s"
    expected = {"scored": 4, "failed/exception": 1, "failed/not_a_number": 4, "failed/crash": 3, "failed/deadline": 1, "workers_lost": 4}
    assert scorer.stats() == expected
    assert scored.timings["score_s"] > 1
    assert "scoring segfault" in (rewards / "log").read_text()


@pytest.mark.slow
async def test_a_worker_that_is_killed_blames_no_trajectory_unless_it_happens_again(rewards):
    (rewards / "killed.py").write_text(
        "import os, pathlib, signal\ndef killed(trajectory, fields):\n    text, seen = trajectory.completion, pathlib.Path('seen')\n"
        "    if text == 'always' or (text == 'once' and not seen.exists()):\n        seen.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    return 1\n"
    )
    scorer = Scorer(RewardSpec("killed:killed"), workers=1, deadline_s=5)
    await scorer.start()
    scored = await scorer.score(group("ok", "once", "ok", "always", "ok"))
    scorer.close()
    assert [t.reward for t in scored.trajectories] == [1, 1, 1, None, 1]
    assert "was killed by SIGKILL" in str(scored.trajectories[3].error)
    assert (scorer.stats()["failed/crash"], scorer.stats()["workers_lost"]) == (1, 3)


async def test_failed_trajectories_are_not_scored(scorer):
    before = group("ok", "ok")
    broken = before.trajectories[0].failed("engine died")
    scored = await scorer.score(Group(7, before.prompt, (broken, before.trajectories[1]), 0))
    assert scored.trajectories[0] == broken
    assert scored.trajectories[1].reward == 0.5


@pytest.mark.slow
async def test_deadline_is_for_each_trajectory(rewards):
    (rewards / "slow.py").write_text("import time\ndef slow(trajectory, fields):\n    time.sleep(0.3)\n    return 1\n")
    scorer = Scorer(RewardSpec("slow:slow"), workers=1, deadline_s=0.9)
    await scorer.start()
    scored = await scorer.score(group(*["ok"] * 5))
    scorer.close()
    assert [t.reward for t in scored.trajectories] == [1] * 5


@pytest.mark.slow
async def test_a_reply_that_waited_for_this_loop_is_not_late(scorer):
    scoring = asyncio.create_task(scorer.score(group("ok")))
    await asyncio.sleep(0.001)
    time.sleep(1.5)  # noqa: ASYNC251 - the parent's own loop is held up past the deadline
    assert (await scoring).trajectories[0].reward == 0.5


async def test_user_code_has_the_main_thread_and_no_secrets(rewards, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hidden")
    scorer = Scorer(RewardSpec("user_rewards:by_text"), workers=1, deadline_s=5)
    await scorer.start()
    scored = await scorer.score(group("main thread", "secret", "pid"))
    assert [t.reward for t in scored.trajectories[:2]] == [1, 0]
    assert scored.trajectories[2].reward == scorer.pids[0] != os.getpid()
    scorer.close()


def test_worker_environment():
    given = {
        "PATH": "/bin",
        "HOME": "/h",
        "hf_token": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "DB_PASSWORD": "x",
        "LANG": "C",
        "GCP_CREDENTIALS": "x",
    }
    kept = worker_environment(given)
    assert {name: kept[name] for name in ("PATH", "HOME", "LANG")} == {"PATH": "/bin", "HOME": "/h", "LANG": "C"}
    assert kept.keys() == {"PATH", "HOME", "LANG", "PYTHONPATH", "PYTHONUNBUFFERED", "CUDA_VISIBLE_DEVICES"}
    assert kept["CUDA_VISIBLE_DEVICES"] == ""
    assert worker_environment({"CUDA_VISIBLE_DEVICES": "1"}, gpus=True)["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.slow
async def test_async_rewards_wait_together_and_are_blamed_alone(rewards):
    scorer = Scorer(RewardSpec("user_rewards:async_by_text"), workers=1, deadline_s=0.7)
    await scorer.start()
    start = time.perf_counter()
    assert [t.reward for t in (await scorer.score(group(*["ok"] * 20))).trajectories] == [1] * 20
    assert time.perf_counter() - start < 1.5  # in order they would take 2 s
    scored = await scorer.score(group("ok", "hang", "raise", "ok"))
    assert [t.reward for t in scored.trajectories] == [1, None, None, 1]
    assert "exceeded 0.7 s" in str(scored.trajectories[1].error)
    assert "raised TimeoutError: judge said no" in str(scored.trajectories[2].error)
    assert scorer.stats()["workers_lost"] == 0
    scored = await scorer.score(group("ok", "exit", "ok"))
    assert [t.reward for t in scored.trajectories] == [1, None, 1]
    assert "exit code 3" in str(scored.trajectories[1].error)
    scored = await scorer.score(group("block", "ok"))
    assert [t.reward for t in scored.trajectories] == [None, 1]
    scorer.close()


@pytest.mark.slow
async def test_a_judge_is_asked_for_many_groups_at_a_time_and_one_that_hangs_delays_no_other(rewards):
    scorer = Scorer(RewardSpec("user_rewards:async_by_text"), workers=1, deadline_s=3.5)
    await scorer.start()
    start = time.perf_counter()
    hung = asyncio.create_task(scorer.score(group("ok", "hang")))
    scored = await asyncio.gather(*(scorer.score(group("ok", "ok", "ok")) for _ in range(60)))
    assert time.perf_counter() - start < 3  # in order the 60 groups would take 6 s
    assert not hung.done()
    assert all(t.reward == 1 for g in scored for t in g.trajectories)
    assert [t.reward for t in (await hung).trajectories] == [1, None]
    assert scorer.stats()["workers_lost"] == 0
    scorer.close()


@pytest.mark.slow
async def test_a_judge_is_not_asked_for_more_than_its_places_at_a_time(rewards):
    (rewards / "counting.py").write_text(
        "import asyncio\nnow = most = 0\nasync def most_at_once(trajectory, fields):\n    global now, most\n    now += 1\n"
        "    most = max(most, now)\n    await asyncio.sleep(0.02)\n    now -= 1\n    return most\n"
    )
    scorer = Scorer(RewardSpec("counting:most_at_once"), workers=1, deadline_s=5)
    await scorer.start()
    scored = await asyncio.gather(*(scorer.score(group(*["ok"] * 20)) for _ in range(10)))
    assert max(t.reward or 0 for g in scored for t in g.trajectories) == AT_ONCE == 64
    scorer.close()


@pytest.mark.slow
@pytest.mark.parametrize(("text", "error"), [("sys.exit", "exit code 4"), ("cancel", "cancelled itself"), ("block", "exceeded 0.7 s")])
async def test_an_async_reward_that_ends_or_holds_its_worker_is_blamed_alone(rewards, text: str, error: str):
    scorer = Scorer(RewardSpec("user_rewards:async_by_text"), workers=1, deadline_s=0.7)
    await scorer.start()
    others = [asyncio.create_task(scorer.score(group("ok", "ok"))) for _ in range(4)]
    scored = await scorer.score(group("ok", text, "ok"))
    assert [t.reward for t in scored.trajectories] == [1, None, 1]
    assert error in str(scored.trajectories[1].error)
    assert all(t.reward == 1 for g in await asyncio.gather(*others) for t in g.trajectories)
    assert (await scorer.score(group("ok"))).trajectories[0].reward == 1
    pids = scorer.pids
    scorer.close()
    assert [await ends(pid) for pid in pids] == [True] * len(pids)


@pytest.mark.slow
async def test_an_async_reward_whose_caller_has_gone_serves_the_next(rewards):
    scorer = Scorer(RewardSpec("user_rewards:async_by_text"), workers=1, deadline_s=0.5)
    await scorer.start()
    scoring = asyncio.create_task(scorer.score(group("hang", "ok")))
    await asyncio.sleep(0.2)
    scoring.cancel()
    await asyncio.wait({scoring})
    await asyncio.sleep(2)  # longer than a worker may be silent
    assert (await scorer.score(group("ok"))).trajectories[0].reward == 1
    assert scorer.stats()["workers_lost"] == 0
    scorer.close()


@pytest.mark.slow
async def test_answers_of_an_async_reward_that_cannot_be_read_leave_nobody_waiting(rewards, monkeypatch):
    """Whatever ends the one that reads them, a worker is replaced and each that waited is tried alone."""
    reply, broken = RewardProcess.reply, []

    async def breaks(self, *, began=False):
        said = await reply(self, began=began)
        if not broken and "reward" in said:
            broken.append(said)
            raise KeyError("number")
        return said

    monkeypatch.setattr(RewardProcess, "reply", breaks)
    scorer = Scorer(RewardSpec("user_rewards:async_by_text"), workers=1, deadline_s=5)
    await scorer.start()
    (first,) = scorer.pids
    scored = await asyncio.wait_for(scorer.score(group("ok", "ok", "ok")), 20)
    assert [t.reward for t in scored.trajectories] == [1, 1, 1]
    assert (len(broken), scorer.stats()["workers_lost"]) == (1, 1)
    assert first not in scorer.pids
    scorer.close()


async def test_nobody_is_blamed_for_a_worker_that_died_idle(scorer):
    (pid,) = scorer.pids
    os.kill(pid, signal.SIGKILL)
    # idle means that it is dead, all of its threads, before the request comes; WNOWAIT leaves its exit status to the scorer
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert (await scorer.score(group("ok"))).trajectories[0].reward == 0.5
    assert scorer.stats()["workers_lost"] == 1


async def test_functions_given_from_python_travel_by_value():
    factor = 3
    scorer = Scorer(RewardSpec.of(RewardConfig.model_validate({}), lambda trajectory, fields: factor), workers=2, deadline_s=5)
    await scorer.start()
    assert [t.reward for t in (await scorer.score(group("a", "b", "c"))).trajectories] == [3, 3, 3]
    scorer.close()
    lock = threading.Lock()
    with pytest.raises(ExtensionError, match=r"cannot be sent to its worker process: .*lock"):
        RewardSpec.of(RewardConfig.model_validate({}), lambda trajectory, fields: lock.locked())


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("user_rewards:by_txt", "has no 'by_txt'; nearest: by_text"),
        ("raises:fn", "module raises could not be imported: ZeroDivisionError: .*raises.py:1"),
        ("exits:fn", "its worker ended with exit code 5 while loading it"),
        ("user_rewards:Broken", "could not be made: RuntimeError: no weights"),
    ],
)
async def test_a_reward_that_cannot_be_loaded_is_an_error_at_start(rewards, reference, message):
    (rewards / "raises.py").write_text("1 / 0\n")
    (rewards / "exits.py").write_text("import os\nos._exit(5)\n")
    scorer = Scorer(RewardSpec(reference), workers=2, deadline_s=5)
    with pytest.raises(ExtensionError, match=message):
        await scorer.start()
    assert not scorer.pids


async def test_close_leaves_nothing_behind_even_in_the_middle(scorer):
    child = int((await scorer.score(group("spawn"))).trajectories[0].reward or 0)
    (pid,) = scorer.pids
    scoring = asyncio.create_task(scorer.score(group("spin")))
    await asyncio.sleep(0.2)
    assert lives(pid)
    assert lives(child)
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring
    assert await ends(pid)
    assert await ends(child)
    assert (await scorer.score(group("ok"))).trajectories[0].reward == 0.5  # a replacement serves
    (replacement,) = scorer.pids
    scorer.close()
    assert not lives(replacement)


async def test_close_while_scoring_starts_no_replacement(scorer):
    scoring = asyncio.create_task(scorer.score(group("sleep", "ok")))
    await asyncio.sleep(0.2)
    (pid,) = scorer.pids
    scorer.close()
    with pytest.raises(RewardFailure, match="was closed while it scored"):
        await scoring
    assert not lives(pid)
    assert not scorer.pids


PARENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from tests.unit.test_scorer import Scorer, RewardSpec, group
async def main():
    scorer = Scorer(RewardSpec("user_rewards:by_text"), workers=2, deadline_s=60)
    await scorer.start()
    print(*scorer.pids, flush=True)
    await scorer.score(group("spin", "sleep"))
asyncio.run(main())
"""


@pytest.mark.slow
async def test_workers_die_with_their_parent_while_stuck_in_user_code(rewards):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PARENT, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=rewards, text=True) as parent:  # noqa: ASYNC220 - the test has one thing to do
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        await asyncio.sleep(0.5)  # they are scoring now
        assert len(pids) == 2
        assert all(lives(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    assert [await ends(pid) for pid in pids] == [True, True]


async def test_a_worker_that_dies_before_it_begins_is_nobodys_fault(scorer, monkeypatch: pytest.MonkeyPatch):
    """The kernel may end a process between our look at it and the request (out of memory, an operator)."""
    send, deaths = RewardProcess.request, []

    async def die_first(self: RewardProcess, *args: Any) -> None:
        if not deaths:
            deaths.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
            await ends(self.pid)
        await send(self, *args)

    monkeypatch.setattr(RewardProcess, "request", die_first)
    scored = await scorer.score(group("ok", "true"))
    assert [t.reward for t in scored.trajectories] == [0.5, 1.0]
    assert scorer.stats()["workers_lost"] == 1


@pytest.mark.parametrize("name", ["of_group", "async_of_group"])
async def test_a_reward_that_scores_groups_gets_all_of_a_group_in_one_call(rewards, name: str):
    scorer = Scorer(RewardSpec(f"user_rewards:{name}"), workers=2, deadline_s=2, log=rewards / "log")
    await scorer.start()

    async def scored(*texts: str) -> Group:
        return await scorer.score(group(*texts))

    try:
        together = await asyncio.gather(scored("a", "b", "c"), scored("nan", "d"), scored("raise", "e"), scored("fewer", "f"))
        killed = await scored("kill once", "g")
        dead, late = await asyncio.gather(scored("h", "exit", "i"), scored("j", "sleep"))
        (one,) = {t.reward for t in (await scored(*["pid"] * 8)).trajectories}
        broken = group("k", "l")
        left = await scorer.score(Group(7, broken.prompt, (broken.trajectories[0].failed("engine died"), broken.trajectories[1]), 0))
    finally:
        scorer.close()
    assert [[t.reward for t in found.trajectories] for found in together] == [[3, 4, 5], [None, 3], [None] * 2, [None] * 2]
    assert [t.reward for t in killed.trajectories] == [2, 3]  # tried once more
    assert one  # all eight by one process
    assert [t.reward for t in left.trajectories] == [None, 1]  # those that had failed before are not among them
    words = [[t.error or "" for t in found.trajectories] for found in (*together[1:], dead, late)]
    assert "returned nan, not a finite number" in words[0][0]
    assert all("raised ValueError: no such group" in error for error in words[1])
    assert all("returned '[1.0]' for 2 trajectories: return a list with one number for each" in error for error in words[2])
    assert all("its process ended with exit code 3" in error for error in words[3])
    assert all("exceeded 2 s" in error for error in words[4])
    assert scorer.stats()["failed/crash"] == 3
