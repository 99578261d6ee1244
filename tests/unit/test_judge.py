"""The judge against a server with real sockets that answers as services do on bad days."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from verst.config.load import load_config
from verst.errors import ExtensionError, RewardFailure
from verst.rewards.judge import Judge, Scale
from verst.rewards.metrics import recording
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.runtime.batching import describe
from verst.types import FinishReason, Group, Message, Prompt, Status, Trajectory, Turn

KEY = "sk-very-secret-0123456789"
EXAMPLE = Path(__file__).parents[2] / "examples/rewards/judge.yaml"


class Service:
    """Answers with `script`: text is a completion, a number a status, a pair that with headers, a callable decides."""

    def __init__(self) -> None:
        self.script: Callable[[str], Any] = lambda asked: "Score: 7"
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.began, self.over = threading.Event(), threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with service.lock:
                    service.bodies.append(body)
                    service.times.append(time.monotonic())
                    service.keys.append(self.headers.get("Authorization"))
                    service.running += 1
                    service.began.set()
                    service.most = max(service.most, service.running)
                answer = service.script(body["messages"][-1]["content"])
                with service.lock:
                    service.running -= 1
                status, headers = answer if isinstance(answer, tuple) else (answer if isinstance(answer, int) else 200, {})
                message = {"choices": [{"message": {"content": answer}}], "usage": {"prompt_tokens": 20, "completion_tokens": 3}}
                data = json.dumps(message if status == 200 else {"error": f"no: {self.headers.get('Authorization')}"}).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Tests print nothing."""

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # who asked has gone
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def hang(self, asked: str) -> str:
        self.over.wait(30)
        return "Score: 1"

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verst.rewards.endpoint._FIRST_PAUSE_S", 0.01)


def counted(**counts: float) -> dict[str, float]:
    """What the judge records: all that it counts, 0 where nothing is said of it."""
    names = ("requests", "cached", "retries", "prompt_tokens", "completion_tokens")
    assert counts.keys() <= set(names)
    return {f"score/judge/{name}": counts.get(name, 0) for name in names}


def judge(service: Service, **options: Any) -> Judge:
    made = Judge(**{"base_url": service.url, "model": "m", "prompt": "Judge {completion} by {answer}", **options})
    made.open()
    return made


def said(text: str, member: int = 0) -> Trajectory:
    arrays = np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32)
    messages = (Message("user", "6 * 7?"), Message("assistant", text))
    return Trajectory(f"0/{member}", *arrays, (Turn(0, 0, 1, FinishReason.STOP, text),), messages, Status.FINISHED, 0)


async def asked(judge: Judge, text: str = "42") -> tuple[float, dict[str, float]]:
    """The score and what was recorded."""
    with recording() as recorded:
        return await judge(said(text), {"answer": "42"}), recorded


def in_turn(*answers: Any) -> Callable[[str], Any]:
    left = list(answers)
    return lambda _: left.pop(0)


async def test_what_is_asked_and_counted(service: Service):
    made = judge(service, prompt="{prompt} {answer} {completion} {not a field} {}", system="Be strict.", extra={"seed": 1})
    score, recorded = await asked(made, "{answer}")
    assert score == 7
    assert recorded == counted(requests=1, prompt_tokens=20, completion_tokens=3)
    content = "6 * 7? 42 {answer} {not a field} {}"  # what a completion has in braces is not filled in
    messages = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": content}]
    assert service.bodies == [{"model": "m", "temperature": 0, "max_tokens": 512, "seed": 1, "messages": messages}]
    with pytest.raises(RewardFailure, match=r"prompt has \{gold\}, of which the task knows nothing; its fields: answer"):
        await asked(judge(service, prompt="{gold}"))


async def test_failures_that_may_pass_are_tried_again(service: Service):
    service.script = in_turn(500, 429, 503, "Score: 3")
    score, recorded = await asked(judge(service))
    assert (score, recorded["score/judge/requests"], recorded["score/judge/retries"]) == (3, 4, 3)
    service.script = lambda _: 500
    with pytest.raises(RewardFailure, match=r"did not answer in 2 tries: HTTP 500"):
        await asked(judge(service, retries=1))


@pytest.mark.parametrize("as_date", [False, True])
async def test_retry_after_is_respected_by_all_requests(service: Service, as_date: bool):
    header = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "0.6"
    service.script = in_turn((429, {"Retry-After": header}), "1", "2")
    made = judge(service)
    first = asyncio.create_task(asked(made, "a"))
    await asyncio.to_thread(service.began.wait, 10)
    await asyncio.sleep(0.15)
    await asyncio.gather(first, asked(made, "b"))
    assert len(service.times) == 3
    assert min(service.times[1:]) - service.times[0] >= (0.9 if as_date else 0.55)


async def test_a_refusal_is_final_and_shows_no_key(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    service.script = lambda _: 401
    with pytest.raises(RewardFailure, match=r"refused: HTTP 401.*no: Bearer \[key\]"):
        await asked(judge(service, api_key_env="JUDGE_API_KEY"))
    assert service.keys == [f"Bearer {KEY}"]
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(ExtensionError, match=r"environment variable JUDGE_API_KEY .* is not set"):
        judge(service, api_key_env="JUDGE_API_KEY")


async def test_a_hang_ends_and_is_tried_again(service: Service):
    service.script = lambda asked: service.hang(asked) if len(service.bodies) == 1 else "Score: 5"
    score, recorded = await asked(judge(service, timeout_s=0.3))
    assert (score, recorded["score/judge/retries"]) == (5, 1)
    service.script = service.hang
    with pytest.raises(RewardFailure, match=r"did not answer in 1 tries: .*Time"):
        await asked(judge(service, timeout_s=0.2, retries=0))


async def test_a_server_that_is_not_there(service: Service):
    with pytest.raises(RewardFailure, match=r"did not answer in 2 tries: ConnectError"):
        await asked(judge(service, base_url="http://127.0.0.1:9/v1", retries=1))


async def test_no_more_at_a_time_and_in_a_minute_than_allowed(service: Service):
    service.script = lambda _: time.sleep(0.05) or "1"
    made = judge(service, max_concurrent=3)
    await asyncio.gather(*(asked(made, str(i)) for i in range(12)))
    assert service.most == 3
    del service.times[:]
    made = judge(service, per_minute=600)
    await asyncio.gather(*(asked(made, str(i)) for i in range(5)))
    assert service.times[-1] - service.times[0] >= 0.35


async def test_the_same_is_asked_once(service: Service, tmp_path: Path):
    service.script = lambda _: time.sleep(0.05) or "1"
    made = judge(service, cache=str(tmp_path / "answers.sqlite"))
    found = await asyncio.gather(*(asked(made) for _ in range(4)))
    assert sorted(recorded["score/judge/cached"] for _, recorded in found) == [0, 1, 1, 1]
    again = await asked(judge(service, cache=str(tmp_path / "answers.sqlite")))  # another process would find it too
    assert again == (1, counted(cached=1))
    assert len(service.bodies) == 1
    await asked(judge(service, cache=str(tmp_path / "answers.sqlite"), model="other"))
    assert len(service.bodies) == 2
    with pytest.raises(ExtensionError, match=r"cache .*nowhere.* cannot be used"):
        judge(service, cache=str(tmp_path / "nowhere/answers.sqlite"))


async def test_costs_are_means_over_all_that_were_judged(service: Service):
    """One request for four equal answers, with 20 + 3 tokens: each trajectory has the counts, also where nothing was spent on it."""
    service.script = lambda _: time.sleep(0.05) or "1"
    made = judge(service)
    found = [recorded for _, recorded in await asyncio.gather(*(asked(made) for _ in range(4)))]
    assert sorted(found, key=lambda recorded: recorded["score/judge/cached"]) == [
        counted(requests=1, prompt_tokens=20, completion_tokens=3),
        *[counted(cached=1)] * 3,
    ]
    trajectories = tuple(replace(said("42", i), reward=1.0, info=recorded) for i, recorded in enumerate(found))
    told = describe([Group(0, Prompt("p:0", ()), trajectories, 0)], [], version=0)
    assert {name: told[name] for name in counted()} == counted(requests=0.25, cached=0.75, prompt_tokens=5, completion_tokens=0.75)


async def test_a_trajectory_that_cannot_be_judged_has_cost_nothing(service: Service):
    with recording() as recorded, pytest.raises(RewardFailure, match="of which the task knows nothing"):
        await judge(service, prompt="{gold}")(said("42"), {})
    assert recorded == counted()


@pytest.mark.parametrize(
    ("options", "text", "score"),
    [
        ({}, "between 1 and 2: 1.5", 1.5),
        ({"low": 0, "high": 10}, "Clear, and right: 8/10", 0.8),
        ({"low": 0, "high": 10}, "I give it 7.5 / 10.", 0.75),
        ({}, "-3", -3),
        ({"pattern": r"Score: *(-?\d+)"}, "score: 1. No: Score: 4 of 10", 4),
        ({"low": 1, "high": 5}, "4", 0.75),
        ({"choices": {"yes": 1, "no": 0}}, "No, or rather YES.", 1),
        ({"choices": {"A": 1, "AB": 0.5}}, "AB", 0.5),
    ],
)
def test_how_an_answer_is_read(options: dict[str, Any], text: str, score: float):
    assert scale(**options).score(text) == score


def scale(pattern: str | None = None, choices: Any = None, low: float | None = None, high: float | None = None) -> Scale:
    return Scale(pattern, choices, low, high)


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({}, "A fine answer.", r"answer has no score .*'A fine answer\.'"),
        ({"low": 0, "high": 10}, "Score: 11", "score 11 is outside of 0 to 10"),
        ({"choices": {"yes": 1, "no": 0}}, "nobody knows", "has no score"),
        ({"pattern": r"<(.*)>", "choices": {"yes": 1}}, "<maybe>", "chose 'maybe', which is none of yes"),
        ({"pattern": r"<(.*)>"}, "<high>", "score 'high' is not a number"),
    ],
)
def test_an_answer_without_a_score_is_none(options: dict[str, Any], text: str, message: str):
    with pytest.raises(RewardFailure, match=message):
        scale(**options).score(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"pattern": "("}, "not a regular expression"),
        ({"low": 2, "high": 1}, "low must be below"),
        ({"choices": {}}, "at least one word"),
        ({"per_minute": 0}, "must be above 0"),
    ],
)
def test_options_are_checked_without_a_server(options: dict[str, Any], message: str):
    with pytest.raises(ExtensionError, match=message):
        Judge(**{"base_url": "http://localhost/v1", "model": "m", "prompt": "{completion}", **options})


async def test_in_its_process_the_example_fails_one_trajectory_alone(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The key reaches the judge's process; prose fails the trajectory it was about, with its costs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    reward = load_config(yaml.safe_load(EXAMPLE.read_text())).reward
    service.script = lambda content: "I cannot say." if "answered: hm" in content else "Fine. Score: 8"
    spec = RewardSpec(reward.function, {**reward.options, "base_url": service.url})
    scorer = Scorer(spec, workers=1, deadline_s=reward.deadline_s, log=tmp_path / "log")
    await scorer.start()
    try:
        scored = await scorer.score(Group(0, Prompt("p:0", (), {"answer": "42"}), tuple(said(t, i) for i, t in enumerate(("42", "hm"))), 0))
    finally:
        scorer.close()
    right, wrong = scored.trajectories
    assert (right.reward, right.error) == (0.8, None)
    assert wrong.status is Status.FAILED
    assert str(wrong.error).startswith("reward judge failed: the judge's answer has no score")
    assert "'I cannot say.'" in str(wrong.error)
    assert wrong.info == right.info == counted(requests=1, prompt_tokens=20, completion_tokens=3)
    assert set(service.keys) == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "log").read_text()


def test_only_the_judge_is_given_the_key():
    options = {"api_key_env": "JUDGE_API_KEY"}
    assert RewardSpec("judge", options).secrets == ("JUDGE_API_KEY",)
    assert RewardSpec("judge", {}).secrets == ()
    assert RewardSpec("mine:judge", options).secrets == ()
    assert RewardSpec("judge", options, b"pickled").secrets == ()
