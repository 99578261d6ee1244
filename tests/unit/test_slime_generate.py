"""Generate functions of slime, unchanged: what they are given, what their posts are answered, and what of their samples is trained."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import httpx
import pytest

from tests.unit.test_roll import END, PROMPT, TOKENIZER, ids, roller
from verst.data.chat import ChatRenderer, load_tokenizer
from verst.errors import ExtensionError
from verst.rewards import slime as rewards
from verst.rollout import user_loop
from verst.rollout.environments import environment_factory
from verst.rollout.rollouts import Rollouts
from verst.rollout.slime import SlimeRollouts
from verst.rollout.tokens import Rolling
from verst.slime_api import Sample, make_importable
from verst.testing import FakeEngine, check_rollout
from verst.types import NO_VERSION, Sampling, Status, Trajectory

EXAMPLE = Path(__file__).parents[2] / "examples/rollouts/from_slime.py"
TEXT = "<|im_start|>user\n6x7?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def _importable() -> Iterator[None]:
    before = set(sys.modules)
    make_importable()
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("slime", "miles", "from_slime"):
            del sys.modules[name]


async def rolled(engine: Any, function: Any, **options: Any) -> Trajectory:
    changes = {"max_turns": options.pop("max_turns", 4), "sampling": Sampling(16)}
    (trajectory,) = (await roller(engine, SlimeRollouts(function, **options), **changes).roll(3, PROMPT)).trajectories
    return trajectory


def url(args: Any) -> str:
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"


async def posted(args: Any, payload: dict[str, Any], path: str = "") -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.post(url(args) + path, content=json.dumps(payload))


async def answered(args: Any, payload: dict[str, Any]) -> dict[str, Any]:
    response = await posted(args, payload)
    assert response.status_code == 200, response.text
    return response.json()


async def plain(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """As slime's own, by hand."""
    sample.tokens = ids(sample.prompt)
    output = await answered(args, {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True})
    new = [item[1] for item in output["meta_info"]["output_token_logprobs"]]
    assert new == output["output_ids"]
    sample.rollout_log_probs = [item[0] for item in output["meta_info"]["output_token_logprobs"]]
    sample.tokens = sample.tokens + new
    sample.response, sample.response_length = output["text"], len(new)
    sample.update_from_meta_info(args, output["meta_info"])
    return sample


async def test_its_port_is_closed_with_its_trajectory_though_nobody_can_end_its_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(user_loop, "GRACE_S", 0.2)
    monkeypatch.setattr(user_loop, "_YIELD_S", 0.2)
    ports: list[int] = []
    let_go = threading.Event()

    async def hangs(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        ports.append(args.sglang_router_port)
        let_go.wait(20)  # in C
        return sample

    try:
        (trajectory,) = (await roller(FakeEngine([]), SlimeRollouts(hangs), environment_deadline_s=0.3).roll(3, PROMPT)).trajectories
        assert trajectory.status is Status.FAILED
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", ports[0])) != 0
    finally:
        let_go.set()


async def test_the_published_function_runs_as_it_is(tmp_path: Path):
    seen: list[Any] = []

    async def noted(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        returned = await plain(args, sample, sampling_params)
        seen.append((args, returned, dict(sampling_params)))
        return returned

    engine = FakeEngine([[*ids("42"), END]])
    trajectory = await rolled(engine, noted, bonus=3)
    ((args, sample, sampling),) = seen
    assert trajectory.status is Status.FINISHED
    assert trajectory.tokens_T.tolist() == [*ids(TEXT), *ids("42"), END] == sample.tokens
    assert trajectory.loss_mask_T.sum() == 3
    assert trajectory.logprobs_T[-3:].tolist() == sample.rollout_log_probs
    assert (sample.prompt, sample.label, sample.metadata) == (TEXT, "42", {"answer": "42"})
    assert (sample.response, sample.status, sample.reward) == ("42<|im_end|>", Sample.Status.COMPLETED, None)
    assert (args.bonus, args.partial_rollout, args.rollout_max_response_len, args.n_samples_per_prompt) == (3, False, 16, 1)
    assert sampling["max_new_tokens"] == 16
    with pytest.raises(AttributeError, match=r"args has no 'search_url'.*rollout.environment_options.search_url"):
        _ = args.search_url


async def test_a_function_that_posts_with_a_client_that_blocks_has_its_answer():
    async def blocking(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        sample.tokens = ids(sample.prompt)
        with httpx.Client(trust_env=False) as client:
            payload = {"input_ids": sample.tokens, "sampling_params": sampling_params}
            output = client.post(url(args), json=payload).json()  # noqa: ASYNC212 - as some do
        sample.tokens = sample.tokens + output["output_ids"]
        sample.response, sample.response_length = output["text"], len(output["output_ids"])
        sample.update_from_meta_info(args, output["meta_info"])
        return sample

    trajectory = await rolled(FakeEngine([[*ids("42"), END]]), blocking)
    assert (trajectory.status, trajectory.tokens_T.tolist()) == (Status.FINISHED, [*ids(TEXT), *ids("42"), END])


async def test_the_example_keeps_the_contract(monkeypatch: pytest.MonkeyPatch, tiny: Path):
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    monkeypatch.chdir(EXAMPLE.parent)
    made = environment_factory("slime:from_slime:generate", {})
    assert isinstance(made, SlimeRollouts)
    tokenizer: Any = load_tokenizer(tiny)
    (trajectory,) = await check_rollout(made, [PROMPT], ["what?", "42"], tokenizer=tokenizer)
    assert tokenizer.decode(trajectory.tokens_T) == f"{TEXT}what?<|im_end|>\nA number, please.\n42<|im_end|>"
    assert tokenizer.decode(trajectory.tokens_T[trajectory.loss_mask_T]) == "what?<|im_end|>42<|im_end|>"
    assert trajectory.status is Status.FINISHED
    assert pickle_of(made).title == "generate function generate"


def pickle_of(made: Rollouts) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(made))


async def test_text_is_tokenised_where_it_is_new_only():
    async def by_text(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        first = await answered(args, {"text": sample.prompt, "sampling_params": {**sampling_params, "max_new_tokens": 2}})
        assert first["meta_info"]["finish_reason"]["type"] == "length"
        body = {"text": sample.prompt + first["text"] + " more", "sampling_params": sampling_params}
        second = await answered(args, body)
        assert second["meta_info"]["prompt_tokens"] == len(ids(TEXT)) + 2 + 5
        sample.tokens = [*ids(sample.prompt), *first["output_ids"], *ids(" more"), *second["output_ids"]]
        sample.response_length = len(sample.tokens) - len(ids(sample.prompt))
        sample.loss_mask = [1, 1, *[0] * 5, *[1] * len(second["output_ids"])]
        sample.status = Sample.Status.TRUNCATED
        refused = await posted(args, {"text": "another"})
        assert (refused.status_code, "tokenised anew" in refused.text) == (400, True)
        return sample

    trajectory = await rolled(FakeEngine([ids("abc"), [*ids("42"), END]]), by_text)
    assert (trajectory.status, trajectory.error) == (Status.TRUNCATED, None)
    assert TOKENIZER.decode(trajectory.tokens_T) == f"{TEXT}ab more42<|im_end|>"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "give input_ids"),
        ({"input_ids": [[1]]}, "whole numbers"),
        ({"input_ids": [1], "text": "a"}, "give input_ids"),
        ({"input_ids": []}, "no tokens to go on from"),
        ({"input_ids": [10**6]}, "is no token of the vocabulary"),
        ({"input_ids": [1], "stream": True}, "stream: not supported"),
        ({"input_ids": [1], "sampling_params": {"n": 2}}, "n must be 1"),
        ({"input_ids": [1], "sampling_params": {"regex": "a"}}, "regex: not supported"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": "9"}}, "give a whole number"),
        ({"input_ids": [1], "sampling_params": {"stop": [13]}}, "stop holds 13: give texts"),
        ({"input_ids": [1], "sampling_params": {"stop": "\ud83d"}}, "stop holds '\\ud83d'"),
        ({"input_ids": [1], "sampling_params": {"stop": 5}}, "stop is 5: give a list of texts"),
        ({"text": "\ud83d"}, "half of a surrogate pair"),
        ({"input_ids": [1], "sampling_params": []}, None),
    ],
)
async def test_a_request_that_cannot_be_answered_says_why(body: dict[str, Any], reason: str | None):
    async def tries(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        response = await posted(args, body)
        if reason is None:
            assert response.status_code == 200
            sample.tokens, sample.response_length = [1, *response.json()["output_ids"]], 1
            return sample
        assert response.status_code == 400
        assert reason in response.json()["error"]["message"]
        elsewhere = await posted(args, {}, "/v1/chat/completions")
        assert (elsewhere.status_code, "post to /generate, and to nothing else" in elsewhere.text) == (404, True)
        return await plain(args, sample, sampling_params)

    trajectory = await rolled(FakeEngine([[END]]), tries)
    assert trajectory.error is None


async def test_sampling_is_the_runs_but_for_limits_and_stops():
    async def warmer(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        return await plain(args, sample, {**sampling_params, "temperature": 0.5, "stop": "!", "max_new_tokens": 3, "ignore_eos": True})

    engine = FakeEngine([[END]])
    trajectory = await rolled(engine, warmer)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.stop, sampling.max_new_tokens) == (1.0, ("!",), 3)
    assert trajectory.info["not_heeded"] == ["ignore_eos", "temperature"]
    assert "not_heeded" not in (await rolled(FakeEngine([[END]]), plain)).info


def changed(**values: Any) -> Any:
    async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        sample = await plain(args, sample, sampling_params)
        for name, value in values.items():
            setattr(sample, name, value(sample) if callable(value) else value)
        return sample

    return generate


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"status": Sample.Status.ABORTED}, "a sample of the status aborted"),
        ({"remove_sample": True}, "remove_sample"),
        ({"tokens": lambda s: [*s.tokens[:-2], 9, 9]}, r"sample.tokens differ at place \d+"),
        ({"loss_mask": [1]}, "loss_mask has 1 entries for a response_length of 3"),
        ({"loss_mask": [0, 0, 0]}, "left to train"),
        ({"response_length": 4, "loss_mask": [1, 1, 1, 1]}, r"trains the token at place \d+, which no policy sampled"),
        ({"tokens": lambda s: [*s.tokens, 5], "response_length": 4, "loss_mask": [1, 1, 1, 1]}, "which no policy sampled"),
    ],
)
async def test_a_sample_that_would_train_other_tokens_fails(values: dict[str, Any], reason: str):
    trajectory = await rolled(FakeEngine([[*ids("42"), END]]), changed(**values))
    assert trajectory.status is Status.FAILED
    assert re.search(reason, trajectory.error or "")
    assert "generate function changed.<locals>.generate" in (trajectory.error or "") or reason == "left to train"


async def test_a_mask_leaves_sampled_tokens_out():
    trajectory = await rolled(FakeEngine([[*ids("42"), END]]), changed(loss_mask=[0, 1, 1]))
    assert trajectory.loss_mask_T[-3:].tolist() == [False, True, True]
    assert trajectory.versions_T[-3:].tolist() == [NO_VERSION, 0, 0]
    shorter = changed(tokens=lambda s: s.tokens[:-1], response_length=2, status=Sample.Status.TRUNCATED)
    cut = await rolled(FakeEngine([[*ids("42"), END]]), shorter)
    assert (cut.loss_mask_T[-3:].tolist(), cut.status) == ([True, True, False], Status.TRUNCATED)
    longer = await rolled(
        FakeEngine([[*ids("42"), END]]), changed(tokens=lambda s: [*s.tokens, 5], response_length=4, loss_mask=[1, 1, 1, 0])
    )
    assert longer.loss_mask_T[-3:].all()


async def test_several_samples_or_none_are_refused_and_a_list_of_one_is_not():
    async def several(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        return [await plain(args, sample, sampling_params)] * args.times

    async def nothing(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        await plain(args, sample, sampling_params)

    assert (await rolled(FakeEngine([[END]]), several, times=1)).error is None
    assert "returned 2 samples" in ((await rolled(FakeEngine([[END]]), several, times=2)).error or "")
    assert "not a Sample" in ((await rolled(FakeEngine([[END]]), nothing)).error or "")


async def test_a_slime_reward_sees_what_the_function_left():
    async def tools(args: Any, sample: Any, sampling_params: dict[str, Any], evaluation: bool) -> Any:
        assert not evaluation
        sample.metadata["searched"] = 2
        sample.tool_call_count, sample.reward = 1, 0.5
        sample.strange = object()
        return await plain(args, sample, sampling_params)

    trajectory = await rolled(FakeEngine([[END]]), tools)
    expected = {"attributes": {"tool_call_count": 1}, "metadata": {"answer": "42", "searched": 2}}
    assert trajectory.info == {"reward": 0.5, "slime": expected}
    caught: list[Any] = []
    rewards.adapt("mine", lambda args, sample: caught.append(sample), {})(trajectory, {"answer": "42"})
    assert (caught[0].tool_call_count, caught[0].metadata["searched"]) == (1, 2)


async def test_the_prompt_without_the_template():
    async def bare(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        return await plain(args, sample, sampling_params)

    engine = FakeEngine([[END]])
    await rolled(engine, bare, apply_chat_template=False)
    assert engine.requests[0].tokens_T.tolist() == ids("6x7?")


def test_lists_that_a_function_holds_grow_with_the_sample():
    """slime's extend in place, so a function may keep them by names of its own."""
    sample = Sample(tokens=[1, 2], response_length=1)
    tokens = sample.tokens
    sample.append_response_tokens(tokens=[3], trainable=False)
    mask, logprobs = sample.loss_mask, sample.rollout_log_probs
    sample.append_response_tokens(tokens=[4, 5], log_probs=[-0.5, -0.25])
    assert (tokens, mask, logprobs, sample.response_length) == ([1, 2, 3, 4, 5], [1, 0, 1, 1], [0.0, 0.0, -0.5, -0.25], 4)
    assert (sample.tokens, sample.loss_mask, sample.rollout_log_probs) == (tokens, mask, logprobs)


async def test_a_reward_is_given_the_prompt_that_the_generate_function_was_given(tiny: Path):
    given: list[Any] = []

    async def noted(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        given.append(sample.prompt)
        return await plain(args, sample, sampling_params)

    def reward(args: Any, sample: Any) -> float:
        given.append(sample.prompt)
        assert args.hf_checkpoint == str(tiny)
        return float((sample.prompt + sample.response).endswith("assistant\n42"))

    trajectory = await rolled(FakeEngine([[*ids("42"), END]]), noted)
    assert rewards.adapt("mine", reward, {}, str(tiny))(trajectory, {}) == 1
    assert rewards.adapt("mine", reward, {"hf_checkpoint": str(tiny)}, "elsewhere")(trajectory, {}) == 1
    assert given == [TEXT] * 3
    trajectory = await rolled(FakeEngine([[*ids("42"), END]]), noted, apply_chat_template=False)
    rewards.adapt("mine", reward, {"apply_chat_template": False}, str(tiny))(trajectory, {})
    assert given[3:] == ["6x7?"] * 2
    with pytest.raises(ExtensionError, match=r"nowhere has no tokenizer .*: name its directory as reward\.options\.hf_checkpoint, or set"):
        rewards.adapt("mine", reward, {}, "/nowhere")


async def wrong(args: Any, sample: Any) -> Any: ...


def not_async(args: Any, sample: Any, sampling_params: Any) -> Any: ...


def test_signatures_are_those_that_slime_calls():
    here = "slime:tests.unit.test_slime_generate"
    assert isinstance(environment_factory(f"{here}:plain", {"search_url": "x"}), SlimeRollouts)
    with pytest.raises(
        ExtensionError, match=r"wrong cannot be called as slime calls it: .*expected: async def generate\(args, sample, sampl"
    ):
        environment_factory(f"{here}:wrong", {})
    with pytest.raises(ExtensionError, match="not_async is no `async def`"):
        environment_factory(f"{here}:not_async", {})


def test_a_rolling_run_is_known_to_the_arguments(tiny: Path):
    from verst.rollout.slime import _arguments

    rolling = Rolling(ChatRenderer(load_tokenizer(tiny)), Sampling(9, top_k=3, stop=("x",)), 2, 99, 4)
    args = _arguments(rolling, 1)
    assert (args["hf_checkpoint"], args["rollout_top_k"], args["rollout_stop"], args["rollout_max_context_len"]) == (
        str(tiny),
        3,
        ["x"],
        99,
    )
