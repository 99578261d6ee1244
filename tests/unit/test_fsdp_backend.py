"""One rank of the `fsdp` backend: against a plain PyTorch loop, and its invariances, bit for bit where that is promised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.unit.fsdp_cases import (
    BATCHES,
    advantages_of,
    largest_difference,
    make_backend,
    make_batch,
    make_config,
    path,
    same_bits,
    save_model,
    train,
    weights_of,
)
from verst.config.algorithms import GrpoConfig
from verst.config.schema import Config
from verst.errors import CheckpointError, InvariantViolation, ModelError, TrainingDiverged
from verst.training.state import RankState
from verst.types import Batch, Sample

__all__ = ["path"]  # a fixture


@pytest.fixture(autouse=True)
def _one_thread() -> Iterable[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- against a loop anyone would write


def plain_logprobs(model: torch.nn.Module, sample: Sample, temperature: float) -> torch.Tensor:
    """Log-probabilities of the loss tokens of one sequence, by transformers and log_softmax."""
    tokens_T = torch.from_numpy(sample.tokens_T).long()
    logs_TV = (model(input_ids=tokens_T[None]).logits[0, :-1] / temperature).log_softmax(-1)
    return logs_TV.gather(1, tokens_T[1:, None])[torch.from_numpy(sample.loss_mask_T)[1:], 0]


def plain_minibatch_loss(
    model: torch.nn.Module, samples: list[Sample], advantages: list[float], old: list[torch.Tensor], reference: list[torch.Tensor]
) -> torch.Tensor:
    """GRPO with clip 0.2, a k3 term of 0.1, the mean over the tokens of the minibatch."""
    terms = []
    for sample, advantage, before, start in zip(samples, advantages, old, reference, strict=True):
        logs = plain_logprobs(model, sample, 0.8)
        ratio = (logs - before).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        gap = start - logs
        terms.append(-surrogate + 0.1 * (gap.exp() - 1 - gap))
    return torch.cat(terms).mean()


def plain_training(config: Config) -> dict[str, torch.Tensor]:
    """Three steps of two minibatches and two epochs: twelve updates, the rate falling on a line after one step of warm-up."""
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    initial = transformers.AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False)
    rates = [1e-2 * f for f in (0.25, 0.5, 0.75, 1.0, *(1 - k / 8 for k in range(8)))]
    for step, batch in enumerate(BATCHES):
        advantages = advantages_of(config, batch, {})
        samples = list(batch.samples)
        with torch.no_grad():
            old = [plain_logprobs(model, s, 0.8) for s in samples]
            reference = [plain_logprobs(initial, s, 0.8) for s in samples]
        for update in range(4):
            part = slice(0, 4) if update % 2 == 0 else slice(4, 8)
            adamw.zero_grad()
            plain_minibatch_loss(model, samples[part], advantages[part], old[part], reference[part]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for group in adamw.param_groups:
                group["lr"] = rates[4 * step + update]
            adamw.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_twelve_updates_equal_a_plain_pytorch_loop(path: str) -> None:
    config = make_config(
        path,
        algorithm={"name": "grpo", "kl_coefficient": 0.1},
        train={"minibatches": 2, "epochs": 2, "schedule": "linear", "warmup_steps": 1},
    )
    backend = make_backend(config)
    start = weights_of(backend)
    tallies = train(backend, config, BATCHES)
    expected = plain_training(config)
    assert largest_difference(start, expected) > 0.02
    # AdamW divides by the root of tiny second moments, so float32 noise of 1e-7 in a gradient can become 1e-4 of the rate.
    assert largest_difference(weights_of(backend), expected) < 5e-5
    for tally in tallies:
        report = tally.report()
        assert report["update/skipped"] == 0
        assert {"loss/total", "policy/entropy", "policy/kl", "policy/clipped_low", "policy/clipped_high", "update/grad_norm"} <= set(report)


def test_supervised_fine_tuning_equals_a_plain_pytorch_loop(path: str) -> None:
    config = make_config(path, algorithm={"name": "sft", "aggregate": "sequence_mean"}, train={"clip_norm": 1e6})
    backend = make_backend(config)
    tallies = train(backend, config, BATCHES[:1])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loss = torch.stack([-plain_logprobs(model, s, 1.0).mean() for s in BATCHES[0].samples]).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    report = tallies[0].report()
    assert report["loss/total"] == pytest.approx(loss.item(), rel=1e-5)
    assert report["update/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


# ---- what load_batch learns


def test_mismatch_is_trainer_minus_behaviour_in_every_step(path: str) -> None:
    """With one update from the first forward, with several from the pass before it: the same numbers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        trainer = torch.cat([plain_logprobs(model, s, 0.8) for s in BATCHES[0].samples]).numpy()
    behaviour = np.concatenate([s.behaviour_logprobs_T[s.loss_mask_T] for s in BATCHES[0].samples])
    expected = np.abs(trainer - behaviour)
    for minibatches in (1, 2):
        config = make_config(path, train={"minibatches": minibatches})
        report = train(make_backend(config), config, BATCHES[:1])[0].report()
        assert report["mismatch/abs_mean"] == pytest.approx(expected.mean(), abs=1e-5)
        assert report["mismatch/abs_max"] == pytest.approx(expected.max(), abs=1e-5)


def test_tokens_of_older_versions_are_not_counted_as_mismatch(path: str) -> None:
    samples = list(make_batch(5).samples)
    samples[0] = replace(samples[0], versions_T=np.where(samples[0].loss_mask_T, 2, -1).astype(np.int32))
    config = make_config(path)
    tally = train(make_backend(config), config, [Batch(5, (0, 1, 2, 3), tuple(samples))])[0]
    assert tally.weights["stale_mismatch/abs_mean"] == samples[0].loss_mask_T.sum()
    assert tally.weights["mismatch/abs_mean"] == sum(s.loss_mask_T.sum() for s in samples[1:])


def test_reference_kl_is_of_each_sample_and_zero_at_the_start(path: str) -> None:
    config = make_config(path, algorithm={"name": "grpo", "kl_coefficient": 0.5, "kl_in": "reward", "kl_estimator": "k1"})
    backend = make_backend(config)
    assert max(map(abs, backend.load_batch(BATCHES[0]).reference_kl.values())) == 0.0
    train(backend, config, BATCHES[:1])
    scores = backend.load_batch(BATCHES[1])
    present = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    initial = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    present.load_state_dict(weights_of(backend))
    with torch.no_grad():
        expected = [(plain_logprobs(present, s, 0.8) - plain_logprobs(initial, s, 0.8)).sum().item() for s in BATCHES[1].samples]
    assert [scores.reference_kl[i] for i in range(8)] == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.1


def test_no_reference_is_kept_without_a_kl_term(path: str) -> None:
    assert make_backend(make_config(path)).load_batch(BATCHES[0]).reference_kl == {}


def test_a_token_outside_the_vocabulary_is_named(path: str) -> None:
    foreign = replace(BATCHES[0].samples[5], tokens_T=BATCHES[0].samples[5].tokens_T + 60)
    batch = replace(BATCHES[0], samples=(*BATCHES[0].samples[:5], foreign))
    with pytest.raises(ModelError, match=r"sample 2/1: token \d+ is not among the model's 64"):
        make_backend(make_config(path)).load_batch(batch)


# ---- invariances


def test_the_division_into_microbatches_does_not_matter(path: str) -> None:
    """The same three steps in one microbatch or in one for each sample: differences are float32 rounding."""
    results = []
    for tokens in (16, 40, 4096):
        config = make_config(path, train={"microbatch_tokens": tokens})
        backend = make_backend(config)
        train(backend, config, BATCHES)
        results.append(weights_of(backend))
    assert largest_difference(results[0], results[2]) < 5e-5
    assert largest_difference(results[1], results[2]) < 5e-5


def test_the_same_batches_give_the_same_bits(path: str) -> None:
    runs = []
    for _ in range(2):
        config = make_config(path, train={"minibatches": 2})
        backend = make_backend(config)
        train(backend, config, BATCHES)
        runs.append(weights_of(backend))
    assert same_bits(*runs)


def test_recomputation_changes_no_bit(path: str) -> None:
    runs = []
    for recompute in (False, True):
        config = make_config(path, train={"gradient_checkpointing": recompute})
        backend = make_backend(config)
        train(backend, config, BATCHES[:2])
        runs.append(weights_of(backend))
    assert same_bits(*runs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler, about torch itself
def test_compiled_layers_train_the_same(path: str) -> None:
    runs = []
    for compiled in (False, True):
        config = make_config(path, train={"compile": compiled, "gradient_checkpointing": compiled})
        backend = make_backend(config)
        train(backend, config, BATCHES[:1])
        runs.append(weights_of(backend))
    assert largest_difference(*runs) < 5e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_other_lengths_make_no_new_graphs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from verst.training import model

    monkeypatch.setattr(model, "compiled", partial(model.compiled, backend="aot_eager"))  # makes the same graphs, without a compiler
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = make_config(path, train={"compile": True})
    backend = make_backend(config)
    train(backend, config, [make_batch(step) for step in range(1, 6)])
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # for one row, and for several, of any length
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_repeated_forward_backward_starts_afresh(path: str) -> None:
    """After another rank failed, the update is computed again: gradients of the failed attempt must not remain."""
    config = make_config(path)
    once, twice = make_backend(config), make_backend(config)
    train(once, config, BATCHES[:1])
    advantages = advantages_of(config, BATCHES[0], {})
    twice.load_batch(BATCHES[0])
    for _ in range(2):
        twice.forward_backward(0, advantages)
    twice.optimizer_step(0)
    assert same_bits(weights_of(once), weights_of(twice))


# ---- skipping


def test_a_non_finite_update_is_skipped_and_counted_and_leaves_no_trace(path: str) -> None:
    config = make_config(path)
    backend = make_backend(config)
    before = backend.state()
    skipped = train(backend, config, BATCHES[:1], advantages=[float("nan")] * 8)[0].report()
    assert skipped["update/skipped"] == 1
    assert "update/grad_norm" not in skipped
    after = backend.state()
    assert same_bits(before.tensors, after.tensors)
    assert after.values["skipped_in_row"] == 1
    healthy = train(backend, config, BATCHES[1:2])[0].report()
    assert healthy["update/skipped"] == 0
    assert backend.state().values["skipped_in_row"] == 0


def test_an_overflowing_gradient_of_a_finite_loss_is_skipped(path: str) -> None:
    config = make_config(path)
    backend = make_backend(config)
    report = train(backend, config, BATCHES[:1], advantages=[3e38] + [0.0] * 7)[0].report()
    assert np.isfinite(report["loss/total"])
    assert report["update/skipped"] == 1


def test_too_many_skipped_updates_in_a_row_stop_the_run(path: str) -> None:
    config = make_config(path, train={"max_skipped_updates": 2})
    backend = make_backend(config)
    train(backend, config, BATCHES[:1], advantages=[float("inf")] * 8)
    with pytest.raises(
        TrainingDiverged,
        match=r"2 updates in a row were not finite.*Resuming trains the same journaled batches again.*"
        r"start a new run .*with a lower train\.lr, or",
    ):
        train(backend, config, BATCHES[1:2], advantages=[float("inf")] * 8)


def test_an_update_without_loss_tokens_moves_only_the_schedule(path: str) -> None:
    config = make_config(path)
    backend = make_backend(config)
    train(backend, config, BATCHES[:1])
    before = backend.state()
    silent = tuple(replace(s, loss_mask_T=np.zeros_like(s.loss_mask_T)) for s in BATCHES[1].samples)
    report = train(backend, config, [replace(BATCHES[1], samples=silent)])[0].report()
    assert report["update/skipped"] == 1
    assert same_bits(before.tensors, backend.state().tensors)
    assert backend.state().values["update"] == before.values["update"] + 1


def test_advantages_must_fit_the_batch(path: str) -> None:
    backend = make_backend(make_config(path))
    backend.load_batch(BATCHES[0])
    with pytest.raises(InvariantViolation, match="3 advantages for 8 samples"):
        backend.forward_backward(0, [1.0, 2.0, 3.0])


def test_a_step_needs_a_batch(path: str) -> None:
    with pytest.raises(InvariantViolation, match="load_batch comes before"):
        make_backend(make_config(path)).optimizer_step(0)


# ---- bfloat16


def test_bfloat16_weights_are_the_rounded_masters(path: str) -> None:
    config = make_config(path, model={"dtype": "bfloat16"}, train={"lr": 1e-4})
    backend = make_backend(config)
    start = weights_of(backend)
    train(backend, config, BATCHES)
    state, weights = backend.state(), weights_of(backend)
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert state.tensors[f"model/{name}"].dtype == torch.float32
        assert torch.equal(weight, state.tensors[f"model/{name}"].bfloat16()), name
    moved = sum(int((state.tensors[f"model/{n}"] != w.float()).sum()) for n, w in start.items())
    visible = sum(int((weights[n] != w).sum()) for n, w in start.items())
    assert moved > 2 * visible > 0, "masters must keep changes too small for bfloat16"


def test_bfloat16_gradients_are_summed_in_float32(path: str) -> None:
    """Sixteen times the same microbatch gradient g: in bfloat16 the running sum would be rounded fifteen times."""
    config = make_config(path, model={"dtype": "bfloat16"}, algorithm={"name": "sft"}, train={"microbatch_tokens": 16, "clip_norm": 1e6})
    sample = next(s for s in BATCHES[0].samples if len(s.tokens_T) > 8)  # so that two never share a microbatch
    single = Batch(1, (0,), (sample,))
    many = Batch(1, tuple(range(16)), tuple(replace(sample, group=g) for g in range(16)))
    norms = [train(make_backend(config), config, [batch])[0].report()["update/grad_norm"] for batch in (single, many)]
    # Token weights differ by 16, a power of two, so each microbatch's gradient is exactly a sixteenth of the single one's.
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


# ---- state


def test_a_state_taken_in_the_middle_continues_bit_for_bit(path: str) -> None:
    config = make_config(path, train={"minibatches": 2, "schedule": "cosine"})
    undisturbed = make_backend(config)
    train(undisturbed, config, BATCHES[:1])
    middle = undisturbed.state()
    noise = torch.rand(3)
    train(undisturbed, config, BATCHES[1:])

    resumed = make_backend(config)
    train(resumed, config, [make_batch(9)])  # whatever happened before must not matter
    resumed.load_state(middle)
    assert torch.equal(torch.rand(3), noise)
    train(resumed, config, BATCHES[1:])
    assert same_bits(undisturbed.state().tensors, resumed.state().tensors)
    assert undisturbed.state().values["update"] == resumed.state().values["update"] == 6
    assert same_bits(weights_of(undisturbed), weights_of(resumed))


def test_a_bfloat16_state_restores_masters_and_model(path: str) -> None:
    config = make_config(path, model={"dtype": "bfloat16"})
    trained, fresh = make_backend(config), make_backend(config)
    train(trained, config, BATCHES[:1])
    fresh.load_state(trained.state())
    for backend in (trained, fresh):
        train(backend, config, BATCHES[1:])
    assert same_bits(trained.state().tensors, fresh.state().tensors)
    assert same_bits(weights_of(trained), weights_of(fresh))


def test_a_state_is_a_private_copy(path: str) -> None:
    config = make_config(path)
    backend = make_backend(config)
    state = backend.state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    train(backend, config, BATCHES[:1])
    assert same_bits(before, state.tensors)


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(path: str, tmp_path: Path) -> None:
    state = make_backend(make_config(path)).state()
    wider = make_backend(make_config(save_model(tmp_path / "wider", intermediate_size=64)))
    with pytest.raises(CheckpointError, match=r"another model: .*layers\.0\.mlp\.gate_proj\.weight \(48, 32\) instead of \(64, 32\)"):
        wider.load_state(state)
    before = wider.state().tensors
    family = make_backend(make_config(save_model(tmp_path / "qwen3", "qwen3")))
    with pytest.raises(CheckpointError, match=r"it lacks exp_avg/model\.layers\.0\.self_attn\.k_norm\.weight.* it has .*bias"):
        family.load_state(state)
    assert same_bits(before, wider.state().tensors)


def test_a_shard_of_another_world_is_refused(path: str) -> None:
    backend = make_backend(make_config(path))
    state = backend.state()
    name = "model/lm_head.weight"
    half = RankState({**state.tensors, name: state.tensors[name][:32]}, state.values, state.full_shapes)
    with pytest.raises(CheckpointError, match=r"model/lm_head.weight has shape \(32, 32\), but rank 0 of 1 holds \(64, 32\)"):
        backend.load_state(half)


# ---- probe


def test_probe_logprobs_are_of_temperature_one(path: str) -> None:
    config = make_config(path)
    assert isinstance(config.algorithm, GrpoConfig)
    tokens_T = BATCHES[0].samples[0].tokens_T
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logs_TV = model(input_ids=torch.from_numpy(tokens_T).long()[None]).logits[0, :-1].log_softmax(-1)
    expected = logs_TV.gather(1, torch.from_numpy(tokens_T[1:]).long()[:, None])[:, 0].numpy()
    found = make_backend(config).logprobs(tokens_T)
    assert found.dtype == np.float32
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], expected, atol=2e-5)
    assert make_backend(config).logprobs(tokens_T[:1]).tolist() == [0.0]
