"""One GPU that trainer and engine use in turn: memory is really free for the other, and no bit changes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from tests.contracts.engine_cases import Update, ask, hf_engine, opening, perturbed, prompt, reached, reference_logprobs
from tests.gpu.test_hf_engine_gpu import reference
from tests.loop.local import local_run
from tests.loop.test_run import ROWS, digests, vowels
from tests.unit.fsdp_cases import BATCHES, make_backend, make_config, same_bits, save_model, train
from verst.runtime.actors import spawn
from verst.runtime.placement import Placement
from verst.runtime.service import RunService
from verst.testing import tiny_model
from verst.weights.offload import Offload, return_unused

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers, the compiler and Ray
]
MIB = 1 << 20


def test_memory_that_is_given_up_is_free_for_other_processes() -> None:
    device = torch.device("cuda")
    gc.collect()
    return_unused(device)  # of the tests before
    generator = torch.Generator("cuda").manual_seed(0)
    flat = torch.randint(0, 256, (600 * MIB,), dtype=torch.uint8, device=device, generator=generator)  # more than one piece of the host's
    views, dropped = flat.split(7 * MIB + 3), torch.ones(100 * MIB, dtype=torch.uint8, device=device)
    before, (free, _) = flat.cpu(), torch.cuda.mem_get_info()
    offload = Offload(device)
    for _ in range(2):
        offload.release(views, [dropped])
        assert torch.cuda.mem_get_info()[0] - free > 690 * MIB
        offload.take_back()
        assert torch.cuda.mem_get_info()[0] - free < 10 * MIB
        assert torch.equal(flat.cpu(), before)
        assert not dropped.any()
    assert all(piece.is_pinned() for piece in offload._host._pieces)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_lends_its_memory_and_trains_on_with_the_same_bits(tmp_path: Path, dtype: str) -> None:
    path = save_model(tmp_path, hidden_size=512, intermediate_size=2048)
    kl = {"name": "grpo", "kl_coefficient": 0.1}
    config = make_config(path, model={"dtype": dtype}, train={"minibatches": 2, "lr": 1e-3}, algorithm=kl)
    undisturbed = make_backend(config, device="cuda")
    train(undisturbed, config, BATCHES)
    expected = undisturbed.state().tensors
    del undisturbed
    gc.collect()
    return_unused(torch.device("cuda"))  # cuBLAS's memory too, which lending gives up
    empty = torch.cuda.memory_allocated()
    lending = make_backend(config, device="cuda")
    parameters = sum(tensor.numel() for _, tensor in lending.weights())
    element = 4 if dtype == "float32" else 2
    for batch in BATCHES:
        train(lending, config, [batch])
        return_unused(torch.device("cuda"))
        full = torch.cuda.memory_allocated()
        lending.release_memory(weights=False)
        assert full - torch.cuda.memory_allocated() >= parameters * (8 if dtype == "float32" else 12)
        assert parameters * element <= torch.cuda.memory_allocated() - empty < parameters * element + 100 * MIB
        lending.release_memory(weights=True)
        assert torch.cuda.memory_allocated() - empty < 100 * MIB  # what tests before this one left
        lending.resume_memory()
        assert abs(torch.cuda.memory_allocated() - full) < MIB
    assert same_bits(expected, lending.state().tensors)


async def test_an_engine_lends_its_memory_and_records_its_graphs_anew(models, tmp_path: Path) -> None:
    path = models("llama")
    async with opening(hf_engine, Path) as start:
        engine = await start(path, device="cuda", max_running=8, threads=None)
        requests = [ask(str(n), prompt(n), seed=n, max_new_tokens=60, temperature=1.5) for n in range(12)]
        answers = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        await reached(engine, "generated_tokens", 60)
        assert engine.stats()["recordings"] > 0
        await engine.pause()
        held = torch.cuda.memory_allocated()
        await engine.release_memory()
        assert engine.stats()["recordings"] == 0
        assert torch.cuda.memory_allocated() < held
        cache = engine._decoder._model.cache  # type: ignore[union-attr]
        assert not cache._layers
        await engine.resume_memory()
        update = Update(perturbed(path), version=4)
        await engine.update_weights(update)
        await engine.resume()
        model = reference(path)
        model.load_state_dict(dict(update.tensors()), strict=False)
        mixed = 0
        for n, answer in enumerate(await asyncio.gather(*answers)):
            new = answer.versions_T == 4
            if not new.any():
                continue  # it had ended before
            whole = torch.cat((torch.from_numpy(prompt(n)), torch.from_numpy(answer.tokens_T))).numpy()
            expected = reference_logprobs(model, whole, 1.5)[len(prompt(n)) - 1 :]
            assert abs(answer.logprobs_T[new] - expected[new]).max() < 1e-4
            mixed += len(set(answer.versions_T)) > 1
        assert mixed
        assert engine.stats()["recordings"] > 0


@pytest.fixture
def own_ray() -> Iterator[None]:
    ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=256 * MIB)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize("transport", ["shared", "file"])
async def test_a_run_that_takes_turns_has_the_bits_of_one_that_does_not(tmp_path: Path, transport: str) -> None:
    model = tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=1024)
    runs = []
    for name, placement in (("turns", Placement(0.5, 0.5, shared=True)), ("together", Placement(0.5, 0.5))):
        values = {
            "run": {"name": name, "dir": str(tmp_path), "steps": 4, "seed": 1},
            "model": {"path": str(model), "dtype": "bfloat16"},
            "checkpoint": {"every_steps": 2},
            "weights": {"transport": transport},
        }
        run = local_run(tmp_path, model, values, reward=vowels, prompts=ROWS)
        await RunService(str(run.run.root), spawn, placement).run()
        runs.append(run)
    turns, together = runs
    assert digests(turns) == digests(together)
    assert len(set(digests(turns))) == 4
    assert max(turns.metric("mismatch/probe")) < 0.1
    assert min(turns.metric("time/lease_s")) > 0
    assert not together.metric("time/lease_s")
