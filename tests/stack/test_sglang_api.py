"""What the engine makes of a server's answers, right and wrong. A small HTTP server stands in for SGLang's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from aiohttp import web

from tests.contracts.engine_cases import ask
from verst.errors import DeadlineExceeded, EngineFailure
from verst.rollout.sglang.api import ServerApi, ServerLost
from verst.rollout.sglang.calls import Calls
from verst.rollout.sglang.engine import SGLangEngine
from verst.rollout.sglang.runs import STOP_STRING_TOKENS, Run
from verst.types import FinishReason


class Stand:
    """Answers paths as told: JSON, a status and a text, or a function of the request."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.seen: list[tuple[str, Any]] = []
        self.headers: list[str | None] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.path, await request.json() if request.can_read_body else None))
        self.headers.append(request.headers.get("Authorization"))
        answer = self.answers.get(request.path, (404, "Not Found"))
        if asyncio.iscoroutinefunction(answer):
            return await answer(request)
        if isinstance(answer, tuple):
            return web.Response(status=answer[0], text=answer[1])
        return web.json_response(answer) if not isinstance(answer, str) else web.Response(text=answer)


@pytest.fixture
async def stand() -> AsyncIterator[tuple[Stand, ServerApi]]:
    stand = Stand()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", stand.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    api = ServerApi(f"http://{host}:{port}", "the key")
    api.open()
    yield stand, api
    await api.close()
    await runner.cleanup()


async def test_errors_carry_the_servers_words_and_the_key_is_sent(stand: tuple[Stand, ServerApi]):
    server, api = stand
    for status in (400, 500):
        server.answers["/generate"] = (status, "the scheduler is full")
        with pytest.raises(EngineFailure, match=f"{status} to /generate: the scheduler is full"):
            await api.generate({}, 5)
    assert set(server.headers) == {"Bearer the key"}
    server.answers["/generate"] = {"text": "no tokens"}
    with pytest.raises(EngineFailure, match="no tokens"):
        await api.generate({}, 5)


async def test_silence_and_a_broken_connection_are_told_apart(stand: tuple[Stand, ServerApi]):
    server, api = stand

    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        raise AssertionError

    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    server.answers["/generate"] = silent
    with pytest.raises(DeadlineExceeded, match=r"/generate: nothing within 0\.1 s"):
        await api.generate({}, 0.1)
    server.answers["/generate"] = hang_up
    with pytest.raises(ServerLost, match="did not answer /generate"):
        await api.generate({}, 5)
    await api.close()
    with pytest.raises(EngineFailure, match="closed"):
        await api.generate({}, 5)


@pytest.mark.parametrize("sessions", [True, False])
async def test_updates_with_and_without_sessions(stand: tuple[Stand, ServerApi], sessions: bool):
    """0.5.18 and later demand begin and end; 0.5.17 knows neither and is asked only once."""
    server, api = stand
    server.answers["/update_weights_from_tensor"] = {"success": True}
    if sessions:
        server.answers |= {"/begin_weight_update": {"success": True}, "/end_weight_update": {"success": True}}
    await api.load_published("/somewhere", 2, 5)
    await api.load_published("/somewhere", 2, 5)
    paths = [path.strip("/").partition("_")[0] for path, _ in server.seen]
    assert paths == (["begin", "update", "end"] * 2 if sessions else ["begin", "update", "update"])
    body = next(body for path, body in server.seen if path == "/update_weights_from_tensor")
    assert len(body["serialized_named_tensors"]) == 2
    assert body["flush_cache"] is False


async def test_a_session_is_closed_after_a_failed_update(stand: tuple[Stand, ServerApi]):
    server, api = stand
    server.answers = {"/begin_weight_update": {}, "/update_weights_from_tensor": (400, "no"), "/end_weight_update": {}}
    with pytest.raises(EngineFailure, match="400 to /update_weights_from_tensor: no"):
        await api.load_published("/somewhere", 1, 5)
    assert server.seen[-1][0] == "/end_weight_update"


async def test_flushing_and_releasing_wait_for_an_idle_server(stand: tuple[Stand, ServerApi]):
    """SGLang answers a request before its scheduler has put it away. A flush is refused until then, and a release kills the server."""
    server, api = stand
    refusals = 2

    async def flush(_: web.Request) -> web.StreamResponse:
        nonlocal refusals
        refusals -= 1
        return web.Response(status=400, text="Flush cache failed.") if refusals >= 0 else web.Response(text="Cache flushed.")

    server.answers |= {"/flush_cache": flush, "/release_memory_occupation": {}, "/resume_memory_occupation": {}}
    await api.flush_cache()
    assert [path for path, _ in server.seen] == ["/flush_cache"] * 3
    refusals = 1
    await api.memory("release", ("weights",), 5)
    await api.memory("resume", ("weights",), 5)
    paths = [path for path, _ in server.seen[3:]]
    assert paths == ["/flush_cache", "/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"]
    refusals = 1_000_000
    with pytest.raises(DeadlineExceeded, match=r"to be idle: not within 0\.1 s.*Flush cache failed"):
        await api.flush_cache(0.1)


async def test_metrics_are_summed_over_ranks_and_rates_averaged(stand: tuple[Stand, ServerApi]):
    server, api = stand
    server.answers["/metrics"] = "\n".join(
        [
            "# HELP sglang:num_running_reqs x",
            'sglang:num_running_reqs{tp_rank="0"} 2.0',
            'sglang:num_running_reqs{tp_rank="1"} 3.0',
            'sglang:cache_hit_rate{tp_rank="0"} 0.25',
            'sglang:cache_hit_rate{tp_rank="1"} 0.75',
            'sglang:generation_tokens_total{model_name="a b} c"} 1e3',
            'sglang:realtime_tokens_total{mode="prefill_compute",tp_rank="0"} 40.0',
            'sglang:realtime_tokens_total{mode="decode",tp_rank="0"} 2.0',
            'sglang:unknown{a="b"} 1',
        ]
    )
    values = {"server_running": 5.0, "cache_hit_rate": 0.5, "server_generated_tokens": 1000.0, "processed_tokens": 42.0}
    assert await api.metrics() == values


def answer(tokens: list[int], logprobs: list[float | None], finish: dict[str, Any]) -> dict[str, Any]:
    entries = [[value, token, None] for value, token in zip(logprobs, [*tokens, 0, 0], strict=False)]
    return {"output_ids": tokens, "meta_info": {"output_token_logprobs": entries, "finish_reason": finish}}


def run_of(**sampling: Any) -> Run:
    request = ask("r", np.array([1, 2], np.int32), **sampling)
    return Run(request, request.sampling.max_new_tokens, "engine", 3)


def test_a_run_collects_tokens_over_several_answers():
    run = run_of(max_new_tokens=50, stop_token_ids=(9,))
    assert run.body("a")["sampling_params"]["max_new_tokens"] == 50
    assert run.take(answer([5, 6], [-1.0, -2.0], {"type": "abort"}), 3) is FinishReason.ABORT
    body = run.body("b")
    assert (body["input_ids"], body["sampling_params"]["max_new_tokens"]) == ([1, 2, 5, 6], 48)
    assert body["sampling_params"]["stop_token_ids"] == [9]
    assert run.take(answer([9], [-3.0], {"type": "stop"}), 4) is FinishReason.STOP
    made = run.generation(FinishReason.STOP)
    assert (made.tokens_T.tolist(), made.logprobs_T.tolist(), made.versions_T.tolist()) == ([5, 6, 9], [-1.0, -2.0, -3.0], [3, 3, 4])


def test_a_run_with_stop_strings_asks_for_little_at_a_time_and_a_greedy_one_is_certain():
    run = run_of(max_new_tokens=100, stop=("x",), temperature=0.0)
    assert run.body("a")["sampling_params"]["max_new_tokens"] == STOP_STRING_TOKENS
    run.take(answer([5], [-1.0], {"type": "length"}), 0)
    assert run.logprobs == [0.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (answer([5, 6], [-1.0], {"type": "stop"}), "2 tokens and 1 log-probabilities"),
        (answer([5], [None], {"type": "stop"}), "not finite"),
        (answer([5], [float("-inf")], {"type": "stop"}), "not finite"),
        (answer([5], [-1.0], {"type": "bored"}), "unknown reason"),
        (answer([], [], {"type": "abort", "status_code": 500, "message": "out of memory"}), "out of memory"),
    ],
)
def test_answers_that_do_not_hold_together_are_failures(given: dict[str, Any], message: str):
    with pytest.raises(EngineFailure, match=message):
        run_of().take(given, 0)


def connected(api: ServerApi, directory: Path) -> SGLangEngine:
    (directory / "config.json").write_text('{"vocab_size": 100}')
    engine = SGLangEngine(str(directory), max_running=4, max_model_tokens=64, log=directory / "log")
    told = {"vocab_size": 100, "has_filters": False, "reader": None, "metrics": {}}
    connection = cast(Any, SimpleNamespace(api=api, is_open=True, owns_server=False, **told))
    engine._connection, engine._calls = connection, Calls(connection)
    return engine


async def test_an_abort_that_overtakes_its_request_is_told_again(stand: tuple[Stand, ServerApi], tmp_path: Path):
    """The server ignores an abort of a request that it does not know yet."""
    server, api = stand
    arrived, ended, told = asyncio.Event(), asyncio.Event(), 0

    async def generate(_: web.Request) -> web.StreamResponse:
        arrived.set()
        await ended.wait()
        finish = {"type": "abort", "message": "aborted"}
        return web.json_response({"output_ids": [7], "meta_info": {"output_token_logprobs": [[-0.5, 7, None]], "finish_reason": finish}})

    async def abort(_: web.Request) -> web.StreamResponse:
        nonlocal told
        told += 1
        if told == 2:
            ended.set()
        return web.json_response({})

    server.answers |= {"/generate": generate, "/abort_request": abort}
    engine = connected(api, tmp_path)
    generating = asyncio.ensure_future(engine.generate(ask("a", np.array([1, 2], np.int32))))
    await arrived.wait()
    async with asyncio.timeout(5):
        await engine.abort(["a"])
        cut = await generating
    assert (cut.tokens_T.tolist(), cut.finish) == ([7], FinishReason.ABORT)
    assert told == 2


async def test_a_cancelled_generation_is_taken_back_from_the_server(stand: tuple[Stand, ServerApi], tmp_path: Path):
    server, api = stand
    arrived = asyncio.Event()

    async def silent(_: web.Request) -> web.StreamResponse:
        arrived.set()
        await asyncio.sleep(5)
        raise AssertionError

    server.answers |= {"/generate": silent, "/abort_request": {}}
    engine = connected(api, tmp_path)
    generating = asyncio.ensure_future(engine.generate(ask("a", np.array([1, 2], np.int32))))
    await arrived.wait()
    generating.cancel()
    await asyncio.wait({generating})
    async with asyncio.timeout(5):
        while server.seen[-1][0] != "/abort_request":  # noqa: ASYNC110 - the server has no events
            await asyncio.sleep(0.01)
    assert server.seen[-1][1] == {"rid": server.seen[0][1]["rid"]}
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0
