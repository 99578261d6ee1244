"""The Python tool: what counts as a call, what the model is told, and whose trajectory ends how."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_roll import END, ids, roller
from verst.config.load import load_config
from verst.errors import EnvironmentFailure, ExtensionError
from verst.rollout import python_tool, sandbox
from verst.rollout.environments import check_machine, environment_factory
from verst.rollout.python_tool import PythonTool
from verst.rollout.sandbox import refusal
from verst.rollout.tool_calls import Call, Malformed, first_call
from verst.runtime.extensions import Extensions
from verst.runtime.rollout_worker import RolloutWorker
from verst.testing import FakeEngine
from verst.types import Completion, FinishReason, Message, Prompt, Reply, Sampling, Status

PROMPT = Prompt("p:0", (Message("user", "6 x 7?"),))
needs_isolation = pytest.mark.skipif(refusal() is not None, reason=f"no isolation on this machine: {refusal()}")


def said(text: str, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, (1,), finish)


def block(code: str) -> str:
    return f"Let me see.\n```python\n{code}\n```"


def call(**changes: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'python', 'arguments': {'code': 'print(1)'}} | changes)}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("42", None),
        ("```\nprint(1)\n```", None),
        ("```pythonic\n```", None),
        (block("print(1)"), Call("print(1)\n", more=False)),
        ("```py\r\nx = '```'\n```\nand\n```python\n2\n```", Call("x = '```'\n", more=True)),
        (call(), Call("print(1)", more=False)),
        (call(arguments='{"code": "print(2)"}'), Call("print(2)", more=False)),
        (call(arguments={"code": "```python"}) + call(), Call("```python", more=True)),
        ("```python print(1)```", "The code begins on the line after"),
        ("```python\nprint(1)", "is not closed"),
        ('<tool_call>{"name": "python"', "has no </tool_call>"),
        ("<tool_call>{'name': 'python'}</tool_call>", "is not valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "is not valid JSON"),
        ("<tool_call>[1]</tool_call>", "is not of the expected form"),
        (call(arguments=None), "is not of the expected form"),
        (call(arguments="{"), "is not valid JSON"),
        (call(name="bash"), "There is no tool 'bash', only python"),
        (call(arguments={"code": ["print(1)"]}), "have no text under code"),
    ],
)
def test_calls_are_found_and_malformed_ones_explained(text: str, found: Any):
    if isinstance(found, str):
        result = first_call(text)
        assert isinstance(result, Malformed)
        assert found in result.reason
    else:
        assert first_call(text) == found


@needs_isolation
async def test_calls_are_run_until_a_completion_has_none():
    tool = PythonTool(timeout_s=20)
    (opening,) = await tool.start(PROMPT)
    assert opening.content.startswith("6 x 7?\nYou can run Python")
    info = {"tool_calls": 1, "tool_errors": 0, "tool_timeouts": 0}
    assert await tool.reply(said(block("print(6 * 7)"))) == Reply((Message("user", "42"),), done=False, info=info)
    silent = await tool.reply(said(call(arguments={"code": "pass"})))
    assert (silent.messages, silent.done) == ((Message("user", "[no output]"),), False)
    failed = await tool.reply(said(block("raise SystemExit('no')") + block("2")))
    assert failed.messages[0].content == "no\n[exit code 1]\n[only the first of your blocks was run]"
    assert await tool.reply(said("42")) == Reply(info={"tool_calls": 3, "tool_errors": 1, "tool_timeouts": 0})
    await tool.close()


@needs_isolation
async def test_every_bad_call_is_told_and_counted():
    tool = PythonTool(max_calls=4, timeout_s=1, output_bytes=10, role="tool", instructions="")
    assert await tool.start(PROMPT) == PROMPT.messages
    told = [
        (await tool.reply(said(text))).messages[0]
        for text in (
            "<tool_call>{}</tool_call>",
            block("import time; time.sleep(100)"),
            block("while True: print('x' * 10**5)"),
            block("import os; os.kill(os.getpid(), 9)"),
        )
    ]
    assert {message.role for message in told} == {"tool"}
    assert told[0].content.startswith("The call is not of the expected form")
    assert told[1].content == "[ended: it took longer than 1 s]"
    assert told[2].content == "xxxxxxxxxx\n[output cut after 10 bytes]\n[ended: it printed too much]"
    assert told[3].content == "[ended by SIGKILL]"
    last = await tool.reply(said(block("print(1)")))  # its calls are used up
    assert last == Reply(info={"tool_calls": 4, "tool_errors": 4, "tool_timeouts": 1})


@needs_isolation
async def test_a_truncated_completion_runs_nothing():
    tool = PythonTool()
    await tool.start(PROMPT)
    reply = await tool.reply(said(block("print(1)"), FinishReason.LENGTH))
    assert reply == Reply(info={"tool_calls": 0, "tool_errors": 0, "tool_timeouts": 0})


@needs_isolation
async def test_what_a_tool_does_is_its_own_trajectorys_affair():
    texts = {"0/0": block("print(7)"), "0/1": block("import time; time.sleep(99)"), "0/2": "<tool_call>x</tool_call>"}
    engine = FakeEngine(lambda request: [*ids(texts[request.id[:3]] if request.id.endswith("/0") else "done"), END])
    environment = partial(PythonTool, timeout_s=1.5, instructions="")
    limits = {"sampling": Sampling(max_new_tokens=200), "max_model_tokens": 900, "environment_deadline_s": 60.0}
    group = await roller(engine, environment, group_size=3, max_turns=3, **limits).roll(0, PROMPT)
    assert [t.status for t in group.trajectories] == [Status.FINISHED] * 3
    assert [(t.info["tool_calls"], t.info["tool_errors"], t.info["tool_timeouts"]) for t in group.trajectories] == [
        (1, 0, 0),
        (1, 1, 1),
        (1, 1, 0),
    ]
    assert group.trajectories[0].messages[2].content == "7"


@needs_isolation
async def test_a_sandbox_that_cannot_be_made_fails_its_trajectory_alone(monkeypatch: pytest.MonkeyPatch):
    engine = FakeEngine(lambda request: [*ids(block("print(7)") if request.id == "0/0/0" else "done"), END])
    monkeypatch.setattr(sandbox, "_WRITABLE", ("/nowhere",))  # after the machine was asked, so that only a call finds out
    limits = {"sampling": Sampling(max_new_tokens=200), "max_model_tokens": 900}
    group = await roller(engine, partial(PythonTool, instructions=""), group_size=2, max_turns=3, **limits).roll(0, PROMPT)
    assert [t.status for t in group.trajectories] == [Status.FAILED, Status.FINISHED]
    assert "reply in turn 1: the sandbox could not be made" in (group.trajectories[0].error or "")
    assert "the sandbox could not be made: mount of /nowhere" in (group.trajectories[0].error or "")


async def test_without_isolation_nothing_starts_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(python_tool, "refusal", lambda: "unshare: Operation not permitted")
    with pytest.raises(EnvironmentFailure, match=r"does not let Python be isolated: unshare: Operation not permitted\. Allow user"):
        await PythonTool().start(PROMPT)
    with pytest.raises(ExtensionError, match="does not let Python be isolated"):
        check_machine(environment_factory("python_tool", {}))

    make: Any = environment_factory("python_tool", {"allow_unisolated": True})
    check_machine(make)
    assert "runs code without isolation, as allow_unisolated says (unshare: Operation not permitted)" in caplog.text
    tool = make()
    await tool.start(PROMPT)
    assert (await tool.reply(said(block("print(6 * 7)")))).messages[0].content == "42"


def test_a_replica_hides_where_the_answers_lie(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_ANSWERS", set())
    monkeypatch.setenv("HF_DATASETS_CACHE", "/cache")
    sets = {"far": {"path": "/far/set.jsonl", "every_steps": 1}, "hub": {"dataset": "saved", "every_steps": 1}}
    values = {
        "run": {"steps": 1, "dir": "/runs"},
        "model": {"path": str(tiny)},
        "data": {"path": "/data/rows.jsonl"},
        "eval": {"sets": sets},
    }
    RolloutWorker(load_config(values), Extensions(), 0, "cpu", tmp_path)._make()
    assert {"/data/rows.jsonl", "/far/set.jsonl", f"{Path.cwd()}/saved", "/runs", "/cache"} <= set(sandbox._hidden())


def test_other_environments_need_nothing_of_the_machine():
    check_machine(environment_factory("guessing", {}))
    check_machine(PythonTool)


def test_options_are_checked_when_it_is_made():
    assert PythonTool(max_calls=2).turns == 3
    with pytest.raises(ValueError, match="max_calls is 0"):
        PythonTool(max_calls=0)
    with pytest.raises(TypeError, match="memory_gb"):
        PythonTool(memory_gb=1)
