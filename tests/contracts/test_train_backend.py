"""What every `TrainBackend` must hold, driven through the protocol alone. A backend joins by a line in `BACKENDS`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stack.megatron_cases import make_megatron
from tests.unit.fsdp_cases import make_backend, make_batch, make_config, same_bits, save_model
from verst.config.schema import Config
from verst.errors import InvariantViolation, TrainingDiverged
from verst.observe.metrics import Tally
from verst.protocols import TrainBackend
from verst.training.distributed import leave_distributed

BACKENDS: Mapping[str, tuple[Callable[[Config], TrainBackend], str]] = {
    "fsdp": (make_backend, "llama"),
    "megatron": (make_megatron, "qwen3"),
}
"""How each is built, and the family of the model it is tried on (Megatron has no biases in Llama's attention)."""

ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.0, 1.5]


@pytest.fixture(scope="module", params=BACKENDS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    leave_distributed()  # Megatron makes a group even of one rank


@pytest.fixture
def build(name: str) -> Callable[[Config], TrainBackend]:
    return BACKENDS[name][0]


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), BACKENDS[name][1])


def run_step(backend: TrainBackend, step: int, advantages: list[float] | None = None) -> Tally:
    tally = Tally().merge(backend.load_batch(make_batch(step)).tally)
    for update in range(backend.num_updates):
        tally.merge(backend.forward_backward(update, advantages or ADVANTAGES))
        tally.merge(backend.optimizer_step(update))
    return tally


def taken(backend: TrainBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in backend.weights()}


def test_version_0_is_the_model_on_disk(build: Callable[[Config], TrainBackend], path: str) -> None:
    from safetensors.torch import load_file

    assert same_bits(taken(build(make_config(path))), load_file(Path(path) / "model.safetensors"))


def test_weights_are_in_the_models_dtype(build: Callable[[Config], TrainBackend], path: str) -> None:
    weights = taken(build(make_config(path, model={"dtype": "bfloat16"})))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_step_makes_the_updates_it_announces_and_tells_of_them(build: Callable[[Config], TrainBackend], path: str) -> None:
    backend = build(make_config(path, train={"minibatches": 2, "epochs": 3}))
    assert backend.num_updates == 6
    tally = run_step(backend, 1)
    assert tally.weights["update/skipped"] == 6
    report = tally.report()
    assert report["update/skipped"] == 0
    assert report["update/lr"] == pytest.approx(1e-2)
    for name in ("mismatch/abs_mean", "loss/total", "policy/entropy", "policy/clipped_low", "update/grad_norm"):
        assert np.isfinite(report[name]), name


def test_ascent_on_one_sample_raises_its_probability(build: Callable[[Config], TrainBackend], path: str) -> None:
    backend = build(make_config(path, train={"weight_decay": 0.0, "lr": 1e-3}))
    sample = make_batch(1).samples[0]

    def logprob() -> float:
        return float(backend.logprobs(sample.tokens_T)[sample.loss_mask_T].sum())

    before = logprob()
    run_step(backend, 1, [1.0] + [0.0] * 7)
    higher = logprob()
    run_step(backend, 1, [-1.0] + [0.0] * 7)
    run_step(backend, 1, [-1.0] + [0.0] * 7)
    assert higher > before + 0.01
    assert logprob() < higher - 0.01


def test_probe_logprobs_start_with_zero_and_follow_the_weights(build: Callable[[Config], TrainBackend], path: str) -> None:
    backend = build(make_config(path))
    tokens_T = make_batch(1).samples[0].tokens_T
    first = backend.logprobs(tokens_T)
    assert (first.dtype, first.shape, first[0]) == (np.float32, tokens_T.shape, 0.0)
    assert (first[1:] < 0).all()
    run_step(backend, 1)
    assert not np.array_equal(first, backend.logprobs(tokens_T))


def test_an_update_that_is_not_finite_changes_no_weight(build: Callable[[Config], TrainBackend], path: str) -> None:
    backend = build(make_config(path, train={"max_skipped_updates": 2}))
    before = taken(backend)
    assert run_step(backend, 1, [float("nan")] * 8).report()["update/skipped"] == 1
    assert same_bits(before, taken(backend))
    with pytest.raises(TrainingDiverged):
        run_step(backend, 2, [float("nan")] * 8)


def test_a_reference_costs_nothing_at_the_initial_weights(build: Callable[[Config], TrainBackend], path: str) -> None:
    backend = build(make_config(path, algorithm={"name": "grpo", "kl_coefficient": 0.1, "kl_in": "reward"}))
    first = backend.load_batch(make_batch(1)).reference_kl
    assert set(first) == set(range(8))
    assert max(first.values()) < 1e-6
    run_step(backend, 1)
    assert max(backend.load_batch(make_batch(2)).reference_kl.values()) > 1e-3


def test_pairs_are_trained_alike_in_any_division(build: Callable[[Config], TrainBackend], path: str) -> None:
    algorithm = {"name": "online_dpo", "beta": 0.5}
    signs = [1.0, -1.0] * 4
    found = []
    for microbatch_tokens in (24, 1000):
        config = make_config(path, algorithm=algorithm, train={"epochs": 2, "microbatch_tokens": microbatch_tokens})
        backend = build(config)
        start = taken(backend)
        reports = [run_step(backend, step, signs).report() for step in (1, 2)]
        assert reports[0]["policy/reward_margin"] > 0  # after its first update the policy is no longer its own reference
        found.append((taken(backend), reports))
    (one, told_one), (other, told_other) = found
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 0.01
    # AdamW divides by the root of tiny second moments, so float32 noise of 1e-7 in a gradient can become 1e-4 of the rate.
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 5e-5
    for name in ("loss/total", "policy/reward_margin", "policy/reward_accuracy", "policy/chosen_reward", "policy/rejected_reward"):
        assert [report[name] for report in told_one] == pytest.approx([report[name] for report in told_other], abs=1e-4)


def test_a_restored_state_continues_with_the_same_bits(build: Callable[[Config], TrainBackend], path: str) -> None:
    config = make_config(path, train={"minibatches": 2})
    undisturbed, resumed = build(config), build(config)
    run_step(undisturbed, 1)
    state = undisturbed.state()
    assert set(state.full_shapes) in (set(), set(state.tensors))  # none where the values say it
    run_step(resumed, 7)
    resumed.load_state(state)
    for backend in (undisturbed, resumed):
        run_step(backend, 2)
    assert same_bits(taken(undisturbed), taken(resumed))
    assert same_bits(undisturbed.state().tensors, resumed.state().tensors)


# ---- memory that is given up between steps


class Storages:
    """The memory of every tensor that comes to be within the block, on the CPU that stands for a device here."""

    def __enter__(self) -> Storages:
        self._before = self._found()
        return self

    def __exit__(self, *error: object) -> None:
        self._own = {key: storage for key, storage in self._found().items() if key not in self._before}

    @property
    def held(self) -> int:
        """Bytes of them now."""
        return sum(storage.nbytes() for storage in self._own.values())

    @staticmethod
    def _found() -> dict[int, torch.UntypedStorage]:
        gc.collect()
        storages = [tensor.untyped_storage() for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor)]
        return {storage._cdata: storage for storage in storages}


CASES = {
    "float32": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "reference": {"algorithm": {"name": "grpo", "kl_coefficient": 0.1}},
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_with_the_same_bits_after_a_loan(build: Callable[[Config], TrainBackend], path: str, case: str) -> None:
    config = make_config(path, train={"minibatches": 2, "lr": 1e-3}, **CASES[case])
    undisturbed, lending = build(config), build(config)
    for step in (1, 2, 3):
        run_step(undisturbed, step)
        lending.release_memory(weights=False)
        lending.release_memory(weights=step != 2)
        lending.release_memory(weights=step == 3)
        lending.resume_memory()
        lending.resume_memory()
        run_step(lending, step)
        assert same_bits(undisturbed.state().tensors, lending.state().tensors)
    before = lending.state()
    weights = taken(lending)
    lending.release_memory(weights=False)
    assert same_bits(taken(lending), weights)  # as the engines are given them
    np.testing.assert_array_equal(
        lending.logprobs(make_batch(1).samples[0].tokens_T), undisturbed.logprobs(make_batch(1).samples[0].tokens_T)
    )
    lending.release_memory(weights=True)
    lending.resume_memory()
    assert same_bits(before.tensors, lending.state().tensors)
    assert same_bits(weights, taken(lending))


@pytest.mark.parametrize("case", CASES)
def test_memory_that_is_given_up_is_really_free(build: Callable[[Config], TrainBackend], path: str, case: str) -> None:
    config = make_config(path, **CASES[case])
    with Storages() as storages:
        backend = build(config)
        run_step(backend, 1)
    parameters = sum(tensor.numel() for _, tensor in backend.weights())
    element = 2 if case == "bfloat16" else 4
    policy, models = parameters * element, parameters * element * (2 if case == "reference" else 1)
    before = storages.held
    # Two moments and, where the model is not float32, masters of its parameters; gradients are dropped already, or buffers.
    assert before >= models + parameters * (12 if case == "bfloat16" else 8)
    backend.release_memory(weights=False)
    assert policy <= storages.held < policy * 1.2
    backend.release_memory(weights=True)
    assert storages.held < policy * 0.2  # counters, tables of positions and the like
    backend.resume_memory()
    assert storages.held == before


def test_calls_that_need_memory_that_is_given_up_are_refused(build: Callable[[Config], TrainBackend], path: str) -> None:
    backend = build(make_config(path))
    state = backend.state()
    tokens_T = make_batch(1).samples[0].tokens_T
    backend.load_batch(make_batch(1))
    backend.forward_backward(0, ADVANTAGES)
    training: dict[str, Callable[[], object]] = {
        "load_batch": lambda: backend.load_batch(make_batch(1)),
        "forward_backward": lambda: backend.forward_backward(0, ADVANTAGES),
        "optimizer_step": lambda: backend.optimizer_step(0),
        "state": backend.state,
        "load_state": lambda: backend.load_state(state),
    }
    reading: dict[str, Callable[[], object]] = {"weights": lambda: list(backend.weights()), "logprobs": lambda: backend.logprobs(tokens_T)}
    for weights in (False, True):
        backend.release_memory(weights=weights)
        for name, call in (training | (reading if weights else {})).items():
            with pytest.raises(InvariantViolation, match=rf"^{name} needs memory that release_memory gave up"):
                call()
    backend.resume_memory()
    with pytest.raises(InvariantViolation, match="no batch is loaded"):  # its gradients were given up
        backend.optimizer_step(0)
    assert run_step(backend, 1).report()["update/skipped"] == 0
