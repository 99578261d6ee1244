"""What every `Engine` promises about a change of weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.contracts.engine_cases import (
    DENSE,
    Opened,
    Update,
    ask,
    load,
    paused,
    perturbed,
    prompt,
    reached,
    reference_logprobs,
)
from verst.errors import EngineFailure, VerstError, WeightMismatch
from verst.types import FinishReason, PauseMode
from verst.weights.names import parts


@pytest.mark.parametrize("model", ["llama", "qwen3", "qwen3_moe"])
async def test_an_update_in_flight_mixes_versions_and_takes_effect(opened: Opened, models: Callable[[str], Path], model: str):
    engine = await opened(model)
    update = Update(perturbed(models(model)), version=4)
    answer = asyncio.ensure_future(engine.generate(ask("flying", prompt(1), seed=2, max_new_tokens=100, temperature=1.5)))
    await reached(engine, "generated_tokens", 5)
    async with paused(engine):
        returned = await engine.update_weights(update)
        assert returned == {entry.name: entry.checksum for entry in update.manifest.entries}
        probe = await engine.logprobs(prompt(6))
    flying = await answer
    assert engine.version == 4
    assert sorted(flying.versions_T) == list(flying.versions_T)
    assert {3, 4} == set(flying.versions_T)
    reference = load(models(model))
    reference.load_state_dict(dict(update.tensors()), strict=False)
    reference.tie_weights()  # type: ignore[operator]
    np.testing.assert_allclose(probe[1:], reference_logprobs(reference, prompt(6)), atol=1e-5)
    # The same prompt again: neither keys and values nor first logits of the old version may be used.
    fresh = await engine.generate(ask("fresh", prompt(1), seed=2))
    expected = reference_logprobs(reference, np.concatenate((prompt(1), fresh.tokens_T)))[8:]
    np.testing.assert_allclose(fresh.logprobs_T, expected, atol=1e-5)
    assert (fresh.versions_T == 4).all()


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
async def test_a_pause_says_which_keys_and_values_requests_go_on_with(opened: Opened, models: Callable[[str], Path], mode: PauseMode):
    engine = await opened(DENSE, max_running=4)
    asked = [ask(str(n), prompt(n), seed=n, max_new_tokens=100, temperature=1.5) for n in range(1, 4)]
    answers = [asyncio.ensure_future(engine.generate(request)) for request in asked]
    update = Update(perturbed(models(DENSE)), version=4)
    await reached(engine, "generated_tokens", 20)
    await engine.pause(mode)
    await engine.update_weights(update)
    await engine.resume()
    reference = load(models(DENSE))
    reference.load_state_dict(dict(update.tensors()), strict=False)
    largest, went_on = 0.0, 0
    for request, answer in zip(asked, await asyncio.gather(*answers), strict=True):
        expected = reference_logprobs(reference, np.concatenate((request.tokens_T, answer.tokens_T)), 1.5)[len(request.tokens_T) - 1 :]
        new = answer.versions_T == 4
        largest = max(largest, float(np.abs(answer.logprobs_T[new] - expected[new]).max(initial=0.0)))
        assert not new.all()
        went_on += bool(new.any())  # one that meets its end of sequence may have ended before
    assert went_on
    assert (largest < 1e-5) if mode is PauseMode.RETRACT else (largest > 1e-3)


async def test_a_pause_may_end_what_is_in_flight(opened: Opened, models: Callable[[str], Path]):
    engine = await opened(DENSE)
    answer = asyncio.ensure_future(engine.generate(ask("a", prompt(1), max_new_tokens=100, temperature=1.5)))
    await reached(engine, "generated_tokens", 5)
    await engine.pause(PauseMode.ABORT)
    cut = await asyncio.wait_for(answer, 10)
    assert cut.finish is FinishReason.ABORT
    assert 5 <= len(cut.tokens_T) < 100
    await engine.resume()


async def test_experts_may_come_one_by_one_as_checkpoints_name_them(opened: Opened, models: Callable[[str], Path]):
    engine = await opened("qwen3_moe")
    fused = perturbed(models("qwen3_moe"))
    state = {part: tensor[index] for name, tensor in fused.items() for part, index, _ in parts(name, tuple(tensor.shape))}
    assert len(state) == len(fused) - 2 * 2 + 2 * 3 * 6  # two layers of six experts
    reference = load(models("qwen3_moe"))
    reference.load_state_dict(fused, strict=False)
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    async with paused(engine):
        with pytest.raises(WeightMismatch, match=rf"lacks '{up}': "):
            await engine.update_weights(Update({name: tensor for name, tensor in state.items() if name != up}, version=4))
        spoilt = await engine.update_weights(update := Update(state, version=4, corrupt=up))
        assert {entry.name for entry in update.manifest.entries if spoilt[entry.name] != entry.checksum} == {up}
        returned = await engine.update_weights(update := Update(state, version=4))
        assert returned == {entry.name: entry.checksum for entry in update.manifest.entries}
        np.testing.assert_allclose((await engine.logprobs(prompt(6)))[1:], reference_logprobs(reference, prompt(6)), atol=1e-5)


async def test_a_corrupted_update_shows_in_the_checksums(served: Opened, models: Callable[[str], Path]):
    engine = await served()
    name = "model.layers.1.mlp.up_proj.weight"
    update = Update(perturbed(models(DENSE)), version=4, corrupt=name)
    async with paused(engine):
        returned = await engine.update_weights(update)
    assert {entry.name for entry in update.manifest.entries if returned[entry.name] != entry.checksum} == {name}


async def test_updates_that_do_not_fit_name_the_tensor_and_change_nothing(served: Opened, models: Callable[[str], Path]):
    engine = await served()
    state = perturbed(models(DENSE))
    name = "model.layers.0.mlp.up_proj.weight"
    bad_states = {
        "lacks": {n: t for n, t in state.items() if n != name},
        "does not have": {**state, "model.layers.0.mlp.extra.weight": torch.zeros(3)},
        r"float32 \(1, 2\)": {**state, name: torch.zeros(1, 2)},
        "bfloat16": {**state, name: state[name].bfloat16().view(torch.int16).view(torch.bfloat16)},
    }
    before = await engine.logprobs(prompt(1))
    with pytest.raises(EngineFailure, match="pause"):
        await engine.update_weights(Update(state, version=4))
    await engine.pause()
    for message, bad in bad_states.items():
        with pytest.raises(WeightMismatch, match=message) as caught:
            await engine.update_weights(_UncheckedUpdate(bad, version=4))
        assert "mlp" in str(caught.value)
    assert engine.version == 3
    np.testing.assert_array_equal(await engine.logprobs(prompt(1)), before)


class _UncheckedUpdate(Update):
    def checksum(self, tensor: torch.Tensor) -> str:
        return "0" * 16


async def test_an_update_that_breaks_off_must_be_repeated_before_resume(served: Opened, models: Callable[[str], Path]):
    engine = await served()
    state = perturbed(models(DENSE))

    class Broken(Update):
        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield next(super().tensors())
            raise OSError("the disk went away")

    await engine.pause()
    with pytest.raises((VerstError, OSError)):
        await engine.update_weights(Broken(state, version=4))
    with pytest.raises(EngineFailure, match="version 4"):
        await engine.resume()
    await engine.update_weights(Update(state, version=4))
    await engine.resume()
    assert (await engine.generate(ask("a", prompt(1)))).versions_T[0] == 4


# ---- memory that is given up


async def test_requests_in_flight_go_on_after_a_loan_of_memory(opened: Opened, models: Callable[[str], Path]):
    """Some run, one waits, two are of one prompt: all are computed anew from the tokens they have, by the weights of then."""
    engine = await opened(max_running=4, deterministic=False)
    asked = [ask(str(n), prompt(max(n, 1)), seed=n, max_new_tokens=40, temperature=1.5) for n in range(5)]
    answers = [asyncio.ensure_future(engine.generate(request)) for request in asked]
    await reached(engine, "generated_tokens", 20)
    update = Update(perturbed(models("llama")), version=4)
    await engine.pause()
    await engine.release_memory(weights=False)
    await engine.release_memory()
    await engine.release_memory()
    await engine.resume_memory()
    await engine.resume_memory()
    await engine.update_weights(update)
    await engine.resume()
    reference = {3: load(models("llama")), 4: load(models("llama"))}
    reference[4].load_state_dict(dict(update.tensors()), strict=False)
    mixed = 0
    for request, answer in zip(asked, await asyncio.gather(*answers), strict=True):
        whole = np.concatenate((request.tokens_T, answer.tokens_T))
        for version in (3, 4):
            chosen = answer.versions_T == version
            # Also of those generated after the loan: no key or value of the older weights is left.
            expected = reference_logprobs(reference[version], whole, 1.5)[len(request.tokens_T) - 1 :]
            np.testing.assert_allclose(answer.logprobs_T[chosen], expected[chosen], atol=1e-5)
        mixed += {3, 4} == set(answer.versions_T)
    assert mixed >= 3


async def test_memory_is_given_up_only_while_paused_and_weights_have_to_be_pushed_again(served: Opened, models: Callable[[str], Path]):
    engine = await served()
    with pytest.raises(EngineFailure, match=r"in use: pause\(\) first"):
        await engine.release_memory()
    state = perturbed(models(DENSE))
    await engine.pause()
    await engine.release_memory(weights=False)
    for call in (engine.resume, lambda: engine.logprobs(prompt(1)), lambda: engine.update_weights(Update(state, 4))):
        with pytest.raises(EngineFailure, match=r"memory is released; resume_memory\(\) first"):
            await call()
    await engine.resume_memory()
    before = await engine.logprobs(prompt(1))  # the weights were not given up
    await engine.resume()
    await engine.pause()
    await engine.release_memory()
    await engine.resume_memory()
    for call in (engine.resume, lambda: engine.logprobs(prompt(1))):
        with pytest.raises(EngineFailure, match="its weights were released"):
            await call()
    await engine.update_weights(Update(state, 4))
    assert not np.array_equal(before, await engine.logprobs(prompt(1)))
    await engine.resume()
    assert (await engine.generate(ask("a", prompt(1)))).versions_T[0] == 4
