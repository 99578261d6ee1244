"""The server's process: how it starts, what it hides, and how it ends, with real servers and with processes that stand in for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.contracts.engine_cases import CONFIGS, MAX_TOKENS, ask, load, perturbed, prompt, reference_logprobs, save_model
from tests.contracts.route_cases import asked, computed_routes
from verst.errors import ConfigError, EngineFailure, ModelError, WeightMismatch
from verst.rollout.sglang import SGLangEngine, connection, server
from verst.rollout.sglang.arguments import OWNED, check
from verst.rollout.sglang.environment import MARKER
from verst.rollout.sglang.server import end_orphans
from verst.weights.files import FileUpdate, publish
from verst.weights.push import push


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"])


def engine_on(model: Path, directory: Path, **options: Any) -> SGLangEngine:
    settings: dict[str, Any] = {
        "max_running": 6,
        "max_model_tokens": MAX_TOKENS,
        "log": directory / "server.log",
        "start_deadline_s": 240.0,
    }
    return SGLangEngine(str(model), **{**settings, "arguments": {"max_total_tokens": 4096}, **options})


def processes_of(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{MARKER}={marker}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def gone(condition: Callable[[], Any], deadline_s: float = 15.0) -> bool:
    limit = time.monotonic() + deadline_s
    while condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_a_server_ends_with_an_engine_that_is_killed(model: Path, tmp_path: Path):
    """SIGKILL of the process that owns the engine, while its server starts."""
    script = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from verst.rollout.sglang import SGLangEngine
        engine = SGLangEngine({str(model)!r}, max_running=2, max_model_tokens=64, log=Path({str(tmp_path / "server.log")!r}))
        asyncio.run(engine.start())
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = tmp_path / "server.log.server.json"
    try:
        assert gone(lambda: not record.exists(), 60)
        marker = json.loads(record.read_text())["marker"]
        assert gone(lambda: not processes_of(marker), 60)
        time.sleep(3)
    finally:
        owner.kill()
        owner.wait()
    assert gone(lambda: processes_of(marker), 60)  # a process that still imports hears of it when it has done so


@pytest.mark.slow
async def test_a_server_that_does_not_start_says_why(model: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())  # no weights
    engine = engine_on(broken, tmp_path)
    with pytest.raises(EngineFailure, match=r"did not start: .*(?s:.*)Cannot find any model weights") as caught:
        await engine.start()
    assert str(tmp_path / "server.log") in str(caught.value)
    assert not (tmp_path / "server.log.server.json").exists()


async def test_a_start_that_takes_too_long_is_ended(model: Path, tmp_path: Path):
    engine = engine_on(model, tmp_path, start_deadline_s=1.0)
    with pytest.raises(EngineFailure, match="not up within 1 s"):
        await engine.start()
    assert not (tmp_path / "server.log.server.json").exists()
    await engine.close()


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process with a server's marker and no parent that waits for it, and the record of it."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], env={**os.environ, MARKER: "abc123"})
    assert gone(lambda: not server._carries(sleeper.pid, "abc123"))  # the kernel shows an environment only some time after Popen returns
    record = tmp_path / "record.json"
    server._write_record(record, sleeper.pid, "abc123")
    yield sleeper, record
    sleeper.kill()
    sleeper.wait()


def test_orphans_of_an_earlier_server_are_found_and_ended(orphan: tuple[subprocess.Popen[bytes], Path]):
    sleeper, record = orphan
    end_orphans(record)
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not record.exists()


def test_a_process_that_only_took_over_the_number_is_left_alone(orphan: tuple[subprocess.Popen[bytes], Path]):
    sleeper, record = orphan
    record.write_text(json.dumps({**json.loads(record.read_text()), "marker": "another"}))
    end_orphans(record)
    time.sleep(0.2)
    assert sleeper.poll() is None


def test_a_torn_record_stops_nobody(tmp_path: Path):
    (tmp_path / "record.json").write_text('{"pid": 1')
    end_orphans(tmp_path / "record.json")
    end_orphans(tmp_path / "none.json")


def damage(update: FileUpdate, tensor: torch.Tensor) -> None:
    """Changes the last number of this tensor in the published file."""
    file, found = Path(update.manifest.location), tensor.numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(found) + len(found) - 1] ^= 0x40
    file.write_bytes(data)


@pytest.mark.slow
async def test_a_server_of_two_ranks_from_its_weights_to_its_death(tmp_path: Path):
    """All that only a server of the engine's own can show, and that of several ranks, in one start."""
    path = save_model(tmp_path / "model", CONFIGS["qwen3_moe"])
    engine = engine_on(path, tmp_path, arguments={"tp-size": 2}, record_routes=True)
    await engine.start()
    try:
        await each_rank_verifies_what_it_holds_and_routes_are_those_of_both(engine, path, tmp_path)
        marker = the_key_is_hidden(engine, tmp_path)
        await its_death_fails_what_is_pending(engine)
    finally:
        await engine.close()
    assert gone(lambda: processes_of(marker))
    assert not (tmp_path / "server.log.server.json").exists()


async def each_rank_verifies_what_it_holds_and_routes_are_those_of_both(engine: SGLangEngine, path: Path, directory: Path) -> None:
    state = perturbed(path)
    update = FileUpdate(publish(4, iter(state.items()), directory / "weights"))
    reference = load(path)
    reference.load_state_dict(state, strict=False)
    await push(engine, update, deadline_s=60)
    answer = await engine.generate(asked("a", prompt(1), max_new_tokens=40))
    whole = np.concatenate((prompt(1), answer.tokens_T))
    np.testing.assert_allclose(answer.logprobs_T, reference_logprobs(reference, whole)[8:], atol=1e-5)
    assert answer.experts_RLK is not None
    np.testing.assert_array_equal(np.sort(answer.experts_RLK, -1), computed_routes(whole, (reference, len(whole) - 1)))
    name = "model.layers.1.mlp.experts.down_proj"  # each rank holds half of every expert
    damage(update, dict(update.tensors())[name][5])
    with pytest.raises(WeightMismatch, match=f"1 different: {name}"):
        await push(engine, update, deadline_s=60)
    await push(engine, FileUpdate(publish(4, iter(state.items()), directory / "weights")), deadline_s=60)


def the_key_is_hidden(engine: SGLangEngine, directory: Path) -> str:
    """Returns the marker that all processes of the server carry."""
    process = engine._connection._server
    assert process is not None
    record = json.loads((directory / "server.log.server.json").read_text())
    everyone = processes_of(record["marker"])
    assert len(everyone) >= 4  # the HTTP process, two schedulers, the detokenizer
    shown = b"".join((Path("/proc") / str(pid) / name).read_bytes() for pid in everyone for name in ("cmdline", "environ"))
    assert process.api_key.encode() not in shown + (directory / "server.log").read_bytes() + json.dumps(record).encode()
    assert b"verst.rollout.sglang.launch" in shown
    return record["marker"]


async def its_death_fails_what_is_pending(engine: SGLangEngine) -> None:
    process = engine._connection._server
    assert process is not None
    pending = [asyncio.ensure_future(engine.generate(ask(str(n), prompt(n), max_new_tokens=140, temperature=0.0))) for n in range(3)]
    await engine.pause()
    waiting = asyncio.ensure_future(engine.generate(ask("waiting", prompt(1))))
    await asyncio.sleep(0.1)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    for answer in [*pending, waiting]:
        if not (answer.done() and answer.exception() is None):
            with pytest.raises(EngineFailure, match=r"signal SIGKILL.*\n?.*"):
                await asyncio.wait_for(answer, 15)
    assert time.monotonic() - started < 5
    with pytest.raises(EngineFailure, match="SIGKILL"):
        await engine.resume()


@pytest.mark.slow
def test_arguments_are_checked_by_sglangs_own_parser():
    wrong = {"attention_backnd": "triton", "schedule_policy": "nope", "mem_fraction_static": "much"}
    with pytest.raises(ConfigError) as caught:
        check({**wrong, "log_level": "warning"}, record_routes=True)
    unknown, choice, kind = str(caught.value).splitlines()  # and nothing about routes: the installed release records them
    assert "attention_backnd" in unknown
    assert "did you mean attention_backend?" in unknown
    assert "schedule_policy" in choice
    assert "'fcfs'" in choice
    assert "mem_fraction_static" in kind
    assert "log_level" not in str(caught.value)


@pytest.mark.parametrize("name", ["model_path", "api-key", "--port", "dtype", "skip_tokenizer_init"])
def test_arguments_that_verst_owns_are_refused_by_name(name: str):
    with pytest.raises(ConfigError, match=rf"rollout\.sglang\.{name} is set by {OWNED[name.removeprefix('--').replace('-', '_')]}"):
        check({name: "x"})


async def test_settings_that_cannot_be_are_refused_before_a_server_starts(model: Path, tmp_path: Path):
    for options, message in (
        ({"arguments": {"host": "0.0.0.0"}}, "host is set by the engine"),
        ({"dtype": "float16"}, "float16"),
        ({"deterministic": True}, "no deterministic mode on a CPU"),
        ({"device": "cuda"}, "model.dtype float32: SGLang's kernels for GPUs compute in bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            await engine_on(model, tmp_path, **options).start()
    assert not (tmp_path / "server.log").exists()
    with pytest.raises(ModelError, match=r"config\.json"):
        engine_on(tmp_path, tmp_path)
    with pytest.raises(EngineFailure, match="before start"):
        await engine_on(model, tmp_path).generate(ask("a", prompt(1)))


async def test_an_external_server_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "WATCH_INTERVAL_S", 0.05)
    engine = engine_on(model, tmp_path, url="http://127.0.0.1:9", start_deadline_s=0.3)
    with pytest.raises(EngineFailure, match=r"no SGLang server answers at http://127\.0\.0\.1:9"):
        await engine.start()
    await engine.close()
