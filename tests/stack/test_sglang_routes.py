"""What the `sglang` engine makes of recorded routes in a server's answers, right and wrong. No server: answers are made by hand."""

from __future__ import annotations

import argparse
import asyncio
import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.contracts.engine_cases import CONFIGS, MAX_TOKENS, ROUTED, ask, save_model
from tests.stack.test_sglang_api import Stand, stand
from verst.errors import ConfigError, EngineFailure, RoutesRefused
from verst.rollout.sglang import SGLangEngine
from verst.rollout.sglang.api import ServerApi
from verst.rollout.sglang.arguments import check, routes_problem
from verst.rollout.sglang.connection import Settings
from verst.rollout.sglang.routes import FLAG, RouteReader
from verst.rollout.sglang.runs import STOP_STRING_TOKENS, Run
from verst.types import FinishReason, RoutedExperts

__all__ = ["stand"]  # a fixture

LAYERS, CHOSEN = 3, 2
ABOUT = {"num_hidden_layers": LAYERS, "num_experts": 8, "num_experts_per_tok": CHOSEN, "mlp_only_layers": [1]}


def recorded(tokens: int, experts: int = 8) -> NDArray[np.int32]:
    """[tokens, layers, K] the dense layer's are zeros, as SGLang leaves them; those of the others differ from token to token."""
    rows = np.random.default_rng(7).integers(1, experts, (tokens, LAYERS, CHOSEN), dtype=np.int32)
    rows[:, 1] = 0
    return rows


def sent(rows: NDArray[Any]) -> str:
    return base64.b64encode(rows.tobytes()).decode()


def reader(about: dict[str, Any] = ABOUT) -> RouteReader:
    made = RouteReader.of(about)
    assert made is not None
    return made


# ---- reading


def test_rows_lose_the_dense_layers_and_take_a_byte():
    rows = recorded(9)
    found = reader().rows({"routed_experts": sent(rows[4:])}, 4, 9)
    assert (found.dtype, found.shape) == (np.uint8, (5, 2, CHOSEN))
    np.testing.assert_array_equal(found, rows[4:, [0, 2]])
    wide = reader(ABOUT | {"num_experts": 300}).rows({"routed_experts": sent(recorded(3, 300))}, 0, 3)
    assert (wide.dtype, wide.max() > 255) == (np.int16, True)


def test_a_release_that_sends_all_rows_is_cut():
    rows = recorded(9)
    np.testing.assert_array_equal(reader().rows({"routed_experts": sent(rows)}, 6, 9), rows[6:, [0, 2]])


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "returned no routes"),
        ({"routed_experts": None}, "returned no routes"),
        ({"routed_experts": sent(recorded(4))}, "routes of 4 tokens, not of the 5 from token 4 on"),
        ({"routed_experts": sent(recorded(6))}, "routes of 6 tokens, not of the 5"),
        ({"routed_experts": sent(recorded(5)[:, :2])[:-4]}, "not those of 3 layers and 2 experts for each token"),
        ({"routed_experts": "no base64!"}, "not those of 3 layers"),
        ({"routed_experts": [[1, 2]]}, "not those of 3 layers"),
        ({"routed_experts": sent(recorded(5) + 5)}, r"experts \d to 12, but the model has 0 to 7"),
    ],
)
def test_rows_that_are_not_those_of_the_tokens_are_refused(meta: dict[str, Any], message: str):
    with pytest.raises(RoutesRefused, match=message):
        reader().rows(meta, 4, 9)


def test_a_dense_model_has_no_reader():
    assert RouteReader.of({"num_hidden_layers": 2}) is None
    assert reader().kind == RoutedExperts(layers=2, experts=8, chosen=2)


# ---- over several answers


def answer(tokens: Sequence[int], rows: NDArray[Any] | None, kind: str = "length") -> dict[str, Any]:
    meta: dict[str, Any] = {"output_token_logprobs": [[-1.0, token, None] for token in tokens], "finish_reason": {"type": kind}}
    return {"output_ids": list(tokens), "meta_info": meta | ({} if rows is None else {"routed_experts": sent(rows)})}


def run_of(prompt_tokens: int, routes_from: int | None, **sampling: Any) -> Run:
    request = replace(ask("r", np.arange(prompt_tokens, dtype=np.int32), **sampling), routes_from=routes_from)
    return Run(request, request.sampling.max_new_tokens, "engine", 3, reader())


def test_each_token_keeps_the_row_of_the_pass_that_sampled_the_next():
    """6 given tokens, of which 2 are known; 3 are generated, then an answer without any, then 2."""
    run = run_of(6, 2, max_new_tokens=9)
    first, second = recorded(8), 7 - recorded(10)
    assert {FLAG.removeprefix("enable_"): True, "routed_experts_start_len": 2}.items() <= run.body("a").items()
    run.take(answer([9, 9, 9], first[2:8], "abort"), 3)
    assert run.body("b")["routed_experts_start_len"] == 8
    run.take(answer([], None, "abort"), 3)
    run.take(answer([8, 8], second[8:10]), 4)
    made = run.generation(FinishReason.LENGTH)
    np.testing.assert_array_equal(made.experts_RLK, np.concatenate((first[2:8], second[8:]))[:, [0, 2]])


def test_after_new_weights_the_newest_tokens_row_comes_from_a_question_of_its_own():
    """Another request may have left the same tokens in the prefix cache, with a row of the older weights."""
    run = run_of(4, 0, max_new_tokens=9)
    old, new, lent = recorded(8), 7 - recorded(8), recorded(8)
    assert not run.needs_newest(4)  # it has no token yet, and will be asked for under a key of version 4
    run.take(answer([9, 9], old[:5], "abort"), 3)
    assert not run.needs_newest(3)
    assert run.needs_newest(4)
    body = run.newest_body("b")
    assert (body["input_ids"], body["routed_experts_start_len"], body["sampling_params"]["max_new_tokens"]) == ([0, 1, 2, 3, 9, 9], 5, 1)
    assert body["extra_key"] == run.body("c")["extra_key"] == "engine:3"
    assert run.newest_row(answer([], None, "abort")) is None
    newest = run.newest_row(answer([5], new[5:6]))
    run.take(answer([8, 8], np.concatenate((lent[5:6], new[6:7]))), 4, newest)
    made = run.generation(FinishReason.LENGTH)
    np.testing.assert_array_equal(made.experts_RLK, np.concatenate((old[:5], new[5:7]))[:, [0, 2]])
    assert not run_of(4, None).needs_newest(4)


def test_rows_end_where_a_stop_string_does():
    run = run_of(4, 1, max_new_tokens=100, stop=("x",))
    rows = recorded(4 + STOP_STRING_TOKENS + 9)
    run.take(answer([9] * STOP_STRING_TOKENS, rows[1 : 3 + STOP_STRING_TOKENS]), 3)
    run.take(answer([9] * 10, rows[3 + STOP_STRING_TOKENS :]), 3)
    run.cut(STOP_STRING_TOKENS + 5)
    made = run.generation(FinishReason.STOP)
    np.testing.assert_array_equal(made.experts_RLK, rows[1 : 4 + STOP_STRING_TOKENS + 5 - 1, [0, 2]])


def test_a_run_that_asks_for_no_routes_gets_none():
    run = run_of(4, None)
    assert "return_routed_experts" not in run.body("a")
    run.take(answer([9], None), 3)
    assert run.generation(FinishReason.LENGTH).experts_RLK is None


def test_short_rows_refuse_the_request_by_name():
    with pytest.raises(RoutesRefused, match="request r: SGLang returned routes of 4 tokens, not of the 5 from token 0 on"):
        run_of(4, 0).take(answer([9, 9], recorded(4)), 3)


# ---- servers that cannot


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("routed"), ROUTED)


def attached(model: Path, directory: Path, url: str) -> SGLangEngine:
    options: dict[str, Any] = {"max_running": 2, "max_model_tokens": MAX_TOKENS, "url": url, "log": directory / "log"}
    return SGLangEngine(str(model), **options, record_routes=True, start_deadline_s=5)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "start it with --enable-return-routed-experts"),
        ({FLAG: True, "enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
    ],
)
async def test_an_external_server_that_records_none_or_wrong_routes_is_refused(
    stand: tuple[Stand, ServerApi], model: Path, tmp_path: Path, info: dict[str, Any], message: str
):
    server, api = stand
    server.answers |= {"/health": {}, "/server_info": info, "/metrics": ""}
    engine = attached(model, tmp_path, api.url)
    with pytest.raises(EngineFailure, match=rf"{message}.*train\.routes=ignore"):
        await engine.start()


async def test_an_answer_without_its_rows_fails_one_request(stand: tuple[Stand, ServerApi], model: Path, tmp_path: Path):
    server, api = stand
    rows = np.zeros((5, LAYERS, CHOSEN), np.int32)
    server.answers |= {"/health": {}, "/server_info": {FLAG: True}, "/metrics": ""}
    engine = attached(model, tmp_path, api.url)
    await engine.start()
    request = replace(ask("a", np.arange(4, dtype=np.int32), max_new_tokens=2), routes_from=0)
    for wrong in (None, rows[:4]):
        server.answers["/generate"] = answer([9, 9], wrong)
        with pytest.raises(RoutesRefused, match="request a: SGLang returned"):
            await engine.generate(request)
    server.answers["/generate"] = answer([9, 9], rows)
    found = await engine.generate(request)
    assert found.experts_RLK is not None
    assert found.experts_RLK.shape == (5, LAYERS, CHOSEN)
    await engine.close()


async def test_a_request_that_waited_for_new_weights_uses_nothing_of_the_older(stand: tuple[Stand, ServerApi], model: Path, tmp_path: Path):
    server, api = stand
    rows = np.zeros((5, LAYERS, CHOSEN), np.int32)
    server.answers |= {"/health": {}, "/server_info": {FLAG: True}, "/metrics": "", "/generate": answer([9, 9], rows)}
    engine = attached(model, tmp_path, api.url)
    await engine.start()
    await engine.pause()
    request = replace(ask("a", np.arange(4, dtype=np.int32), max_new_tokens=2), routes_from=0)
    waiting = asyncio.ensure_future(engine.generate(request))
    await asyncio.sleep(0)
    engine._version = 7
    await engine.resume()
    assert (await waiting).versions_T.tolist() == [7, 7]
    questions = [body for path, body in server.seen if path == "/generate"]
    assert [body["extra_key"].partition(":")[2] for body in questions] == ["7"]
    await engine.close()


def test_an_engine_that_gives_up_is_no_matter_of_routes():
    gone = answer([9], None)
    gone["meta_info"]["finish_reason"] = {"type": "abort", "status_code": 500, "message": "out of memory"}
    with pytest.raises(EngineFailure, match="out of memory"):
        run_of(4, 0).take(gone, 3)


def test_the_flag_belongs_to_verst_and_is_set_for_models_that_route(model: Path, tmp_path: Path):
    dense = save_model(tmp_path / "dense", CONFIGS["llama"])

    def of(path: Path, record_routes: bool, **arguments: Any) -> dict[str, Any]:
        return Settings(
            str(path), "float32", "cpu", 2, MAX_TOKENS, False, arguments, None, tmp_path / "log", 5.0, record_routes
        ).server_arguments()

    assert of(model, True)[FLAG] is True
    assert FLAG not in of(model, False)
    assert FLAG not in of(dense, True)
    with pytest.raises(ConfigError, match=rf"rollout\.sglang\.{FLAG} is set by train\.routes"):
        check({FLAG: True})
    moving = r"hierarchical.cache: SGLang would record wrong expert routes"
    with pytest.raises(ConfigError, match=moving):
        check({"enable-hierarchical-cache": True}, record_routes=True)
    with pytest.raises(ConfigError, match=moving):
        of(model, True, enable_hierarchical_cache=True)
    assert of(model, False, enable_hierarchical_cache=True)["enable_hierarchical_cache"] is True


def test_a_release_without_the_flag_is_named():
    parser = argparse.ArgumentParser()
    message = routes_problem(parser)
    assert message is not None
    assert "no --enable-return-routed-experts" in message
    parser.add_argument("--enable-return-routed-experts", action="store_true")
    assert routes_problem(parser) is None
