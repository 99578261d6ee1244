"""The critic of the `fsdp` backend, on one rank: against a plain PyTorch loop of PPO; its state, its memory, and where it begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.unit.fsdp_cases import (
    BATCHES,
    largest_difference,
    make_backend,
    make_config,
    path,
    same_bits,
    save_model,
    train,
    weights_of,
)
from tests.unit.test_critic import by_definition
from tests.unit.test_fsdp_backend import plain_logprobs
from verst.config.plan import plan_lines
from verst.config.schema import Config
from verst.errors import CheckpointError, ConfigError, CorruptWeights, InvariantViolation, ModelError, TrainingDiverged
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import preflight
from verst.training.fsdp import FsdpBackend
from verst.training.fsdp_critic import FsdpCritic
from verst.training.state import RankState
from verst.types import Sample

__all__ = ["path"]  # a fixture

PPO = {"name": "ppo", "gamma": 0.99, "gae_lambda": 0.9, "critic_lr": 2e-2}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def own(backend: FsdpBackend) -> FsdpCritic:
    assert isinstance(backend._critic, FsdpCritic)
    return backend._critic


def critic_of(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in own(backend).parameters.items()}


# ---- against a loop anyone would write


class PlainCritic(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        self.score = torch.nn.Linear(32, 1, bias=False)
        torch.nn.init.zeros_(self.score.weight)

    def forward(self, sample: Sample) -> torch.Tensor:
        tokens_T = torch.from_numpy(sample.tokens_T).long()
        values_T = self.score(self.model(input_ids=tokens_T[None]).last_hidden_state)[0, :, 0]
        return values_T[:-1][torch.from_numpy(sample.loss_mask_T)[1:]]


def adamw(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), foreach=False)


def stepped(model: torch.nn.Module, optimizer: torch.optim.AdamW, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def plain_training(path: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three steps of two minibatches and two epochs; the weights of policy and critic."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    critic = PlainCritic(path)
    for_policy, for_critic = adamw(policy, 1e-2), adamw(critic, 2e-2)
    for batch in BATCHES:
        with torch.no_grad():
            old = [plain_logprobs(policy, s, 0.8) for s in batch.samples]
            before = [critic(s) for s in batch.samples]
        raw = [
            torch.tensor(by_definition([0.0] * (len(v) - 1) + [s.reward], v.double().tolist(), 0.99, 0.9))
            for s, v in zip(batch.samples, before, strict=True)
        ]
        returns = [(a + v.double()).float() for a, v in zip(raw, before, strict=True)]
        every = torch.cat(raw)
        advantages = [((a - every.mean()) / (every.std() + 1e-6)).float() for a in raw]
        for update in range(4):
            part = range(4) if update % 2 == 0 else range(4, 8)
            ratios = {i: (plain_logprobs(policy, batch.samples[i], 0.8) - old[i]).exp() for i in part}
            gains = [torch.minimum(ratios[i] * advantages[i], ratios[i].clamp(0.8, 1.2) * advantages[i]) for i in part]
            stepped(policy, for_policy, -torch.cat(gains).mean())
            squares = []
            for i in part:
                value = critic(batch.samples[i])
                bounded = before[i] + (value - before[i]).clamp(-0.2, 0.2)
                squares.append(torch.maximum((value - returns[i]) ** 2, (bounded - returns[i]) ** 2) / 2)
            stepped(critic, for_critic, torch.cat(squares).mean())
    return dict(policy.requires_grad_(False).named_parameters()), dict(critic.requires_grad_(False).named_parameters())


def test_twelve_updates_of_both_models_equal_a_plain_pytorch_loop(path: str) -> None:
    config = make_config(path, algorithm=PPO, train={"minibatches": 2, "epochs": 2})
    backend = make_backend(config)
    policy, critic = weights_of(backend), critic_of(backend)
    tallies = train(backend, config, BATCHES)
    plain_policy, plain_critic = plain_training(path)
    assert largest_difference(policy, plain_policy) > 0.02
    assert largest_difference(critic, plain_critic) > 0.02
    for found, plain in ((weights_of(backend), plain_policy), (critic_of(backend), plain_critic)):
        differences = torch.cat([(found[name] - parameter).abs().flatten() for name, parameter in plain.items()])
        assert float(differences.mean()) < 2e-6
        # AdamW divides by the root of tiny second moments (see test_fsdp_backend), and float32 noise of the values is in the advantages.
        assert float((differences > 1e-5).float().mean()) < 1e-3
        assert float(differences.max()) < 1e-3
    reports = [tally.report() for tally in tallies]
    for report in reports:
        assert report["update/skipped"] == report["critic/skipped"] == 0
        assert report["critic/lr"] == pytest.approx(2e-2)
        assert {"critic/loss", "critic/clipped", "critic/grad_norm", "policy/ratio"} <= report.keys()


@pytest.mark.parametrize(("rate", "expected"), [(None, [1e-2, 1e-3]), (2e-2, [2e-2, 2e-2])])
def test_changes_at_a_step_are_the_critics_too(path: str, rate: float | None, expected: list[float]) -> None:
    """Its learning rate, where that is the policy's, and the bound of its gradient: by Adam's first moment, a tenth of it in step 1."""
    changes = [{"step": 2, "options": {"train.lr": 1e-3, "train.clip_norm": 1e-6}}]
    config = make_config(path, algorithm={**PPO, "critic_lr": rate}, run={"changes": changes})
    backend = make_backend(config)
    reports = [tally.report() for tally in train(backend, config, BATCHES[:2])]
    assert [report["critic/lr"] for report in reports] == pytest.approx(expected)
    assert [report["update/lr"] for report in reports] == pytest.approx([1e-2, 1e-3])
    moments = [m for name, m in own(backend).optimizer.tensors().items() if name.startswith("exp_avg/")]
    norm = float(torch.stack([m.square().sum() for m in moments]).sum().sqrt())
    bound = min(0.5, reports[0]["critic/grad_norm"])
    assert norm == pytest.approx(0.9 * 0.1 * bound, rel=1e-4)  # betas are 0.9 and 0.95; the second gradient adds 1e-7


def test_a_critic_that_diverges_names_its_own_learning_rate(path: str) -> None:
    for rate, option in ((None, r"train\.lr"), (2e-2, r"algorithm\.critic_lr")):
        config = make_config(path, algorithm={**PPO, "critic_lr": rate}, train={"max_skipped_updates": 1})
        backend = make_backend(config)
        values = backend.load_batch(BATCHES[0]).values
        backend.forward_backward(0, [1.0, -1.0] * 4, [np.full_like(values[i], np.nan) for i in range(8)])
        with pytest.raises(TrainingDiverged, match=rf"with a lower {option}, or"):
            backend.optimizer_step(0)


def test_the_gradient_of_the_value_loss_is_that_of_plain_pytorch(path: str) -> None:
    config = make_config(path, algorithm={**PPO, "value_clip": 0.0})
    backend, plain = make_backend(config), PlainCritic(path)
    returns = [np.full(int(s.loss_mask_T.sum()), i - 3.0, np.float32) for i, s in enumerate(BATCHES[0].samples)]
    with torch.no_grad():  # else only the head had a gradient
        for head in (plain.score.weight, own(backend).parameters["score.weight"]):
            head.copy_(torch.linspace(-1, 1, 32)[None])
    backend._rest.keep("the head was set", always=True)
    scores = backend.load_batch(BATCHES[0])
    for i, sample in enumerate(BATCHES[0].samples):
        np.testing.assert_allclose(scores.values[i], plain(sample).detach().numpy(), atol=1e-5)
    backend.forward_backward(0, [0.0] * 8, returns)
    errors = [plain(s) - torch.from_numpy(r) for s, r in zip(BATCHES[0].samples, returns, strict=True)]
    (torch.cat(errors).square() / 2).mean().backward()
    found = own(backend).parameters
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert found[name].grad is not None
        torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)


# ---- its state


def test_a_resumed_run_has_the_bits_of_one_that_went_on(path: str) -> None:
    config = make_config(path, algorithm=PPO, train={"minibatches": 2, "schedule": "linear"})
    undisturbed = make_backend(config)
    train(undisturbed, config, BATCHES[:1])
    middle = undisturbed.state()
    train(undisturbed, config, BATCHES[1:])
    resumed = make_backend(config)
    resumed.load_state(middle)
    for batch in BATCHES[1:]:
        resumed.release_memory(weights=True)
        resumed.resume_memory()
        train(resumed, config, [batch])
    end = undisturbed.state()
    assert same_bits(end.tensors, resumed.state().tensors)
    assert end.values == resumed.state().values
    assert sum(name.startswith("critic/model/") for name in end.tensors) == len(critic_of(undisturbed))


def test_the_state_of_a_run_without_a_critic_is_refused(path: str) -> None:
    without = make_backend(make_config(path)).state()
    with_critic = make_backend(make_config(path, algorithm=PPO))
    with pytest.raises(CheckpointError, match="it lacks critic/"):
        with_critic.load_state(without)
    with pytest.raises(CheckpointError, match="it has critic/"):
        make_backend(make_config(path)).load_state(with_critic.state())
    counted = with_critic.state()
    with_critic.load_state(RankState(counted.tensors, {**counted.values, "update": 2}, counted.full_shapes))
    assert with_critic.state().values["critic"]["update"] == 2


def test_memory_that_is_given_up_includes_the_critics(path: str) -> None:
    backend = make_backend(make_config(path, algorithm=PPO))
    storages = [t.untyped_storage() for t in (*own(backend).parameters.values(), *own(backend).optimizer.tensors().values())]
    before = critic_of(backend)
    backend.release_memory(weights=False)
    assert sum(storage.nbytes() for storage in storages) == 0
    backend.resume_memory()
    assert same_bits(critic_of(backend), before)


def test_a_critic_that_changed_by_itself_is_found(path: str) -> None:
    config = make_config(path, algorithm=PPO)
    backend = make_backend(config)
    train(backend, config, BATCHES[:1])
    with torch.no_grad():
        own(backend).parameters["score.weight"][0, 3] += 1e-3
    with pytest.raises(CorruptWeights, match=r"critic/weights/score\.weight"):
        backend.load_batch(BATCHES[1])


def test_neither_the_weights_nor_the_export_have_the_critic(path: str) -> None:
    assert weights_of(make_backend(make_config(path, algorithm=PPO))).keys() == weights_of(make_backend(make_config(path))).keys()


# ---- a step


def test_the_first_steps_train_the_critic_alone(path: str) -> None:
    config = make_config(path, algorithm={**PPO, "critic_warmup_steps": 2})
    backend = make_backend(config)
    policy, critic = weights_of(backend), critic_of(backend)
    reports = [tally.report() for tally in train(backend, config, BATCHES[:2])]
    assert same_bits(weights_of(backend), policy)
    assert largest_difference(critic_of(backend), critic) > 0.01
    assert [report["update/skipped"] for report in reports] == [1, 1]
    assert [report["critic/skipped"] for report in reports] == [0, 0]
    last = train(backend, config, BATCHES[2:])[0].report()
    assert last["update/skipped"] == 0
    assert largest_difference(weights_of(backend), policy) > 1e-3


def test_the_critic_learns_what_a_batch_has_earned(path: str) -> None:
    """The same batch again and again: the values become its returns."""
    config = make_config(path, run={"steps": 30}, algorithm={**PPO, "critic_warmup_steps": 29, "gamma": 1.0, "value_clip": 0.0})
    reports = [tally.report() for tally in train(make_backend(config), config, [replace(BATCHES[0], step=n) for n in range(1, 30)])]
    assert reports[-1]["critic/loss"] < 0.1 * reports[0]["critic/loss"]


def test_a_return_that_is_not_finite_skips_the_critics_update_alone(path: str) -> None:
    config = make_config(path, algorithm=PPO)
    backend = make_backend(config)
    values = backend.load_batch(BATCHES[0]).values
    returns = [values[i].copy() for i in range(8)]
    returns[3][0] = np.nan
    critic, policy = critic_of(backend), weights_of(backend)
    backend.forward_backward(0, [1.0, -1.0] * 4, returns)
    tally = backend.optimizer_step(0)
    assert tally.report()["critic/skipped"] == 1
    assert tally.report()["update/skipped"] == 0
    (note,) = tally.notes
    assert note.startswith("update 1 of 1 of step 1, of the critic, is not finite, and is skipped: trainer rank 0: sample 1/1: its value")
    assert same_bits(critic_of(backend), critic)
    assert not same_bits(weights_of(backend), policy)


def test_advantages_and_returns_must_fit_the_tokens(path: str) -> None:
    backend = make_backend(make_config(path, algorithm=PPO))
    values = backend.load_batch(BATCHES[0]).values
    fitting = [values[i] for i in range(8)]
    with pytest.raises(InvariantViolation, match="0 returns for 8 samples"):
        backend.forward_backward(0, fitting)
    with pytest.raises(InvariantViolation, match=r"sample 0/0: \d+ advantages for \d+ loss tokens"):
        backend.forward_backward(0, [fitting[0][1:], *fitting[1:]], fitting)


def test_advantages_of_tokens_that_are_equal_are_those_of_the_sample(path: str) -> None:
    """One number for a sample and the same number for each of its tokens: the same bits."""
    config = make_config(path)
    ends = []
    for of_tokens in (False, True):
        backend = make_backend(config)
        backend.load_batch(BATCHES[0])
        told = [np.full(int(s.loss_mask_T.sum()) if of_tokens else (), i - 3.0, np.float32) for i, s in enumerate(BATCHES[0].samples)]
        backend.forward_backward(0, told)
        backend.optimizer_step(0)
        ends.append(weights_of(backend))
    assert same_bits(*ends)


# ---- where it begins


def test_a_reward_model_gives_its_head_too(path: str, tmp_path: Path) -> None:
    reward_model = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.from_pretrained(path, num_labels=1))
    reward_model.save_pretrained(tmp_path / "reward")
    backend = make_backend(make_config(path, algorithm={**PPO, "critic_path": str(tmp_path / "reward")}))
    assert same_bits(critic_of(backend), dict(reward_model.named_parameters()))
    two = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.from_pretrained(path, num_labels=2))
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match=r"algorithm\.critic_path .*two: the weight files have no fitting tensor for score\.weight"):
        make_backend(make_config(path, algorithm={**PPO, "critic_path": str(tmp_path / "two")}))


def checked(config: Config) -> None:
    preflight(config, Extensions())


def test_a_directory_that_cannot_be_the_critics_is_told_before_anything_starts(path: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"algorithm\.critic_path: .*nothing has no config\.json"):
        checked(make_config(path, algorithm={**PPO, "critic_path": str(tmp_path / "nothing")}))
    small = save_model(tmp_path / "small", vocab_size=32)
    with pytest.raises(ModelError, match=r"algorithm\.critic_path: .* knows 32 tokens, .* 64"):
        checked(make_config(path, algorithm={**PPO, "critic_path": small}))


def test_the_plan_counts_the_critics_memory(path: str, tmp_path: Path) -> None:
    """Four numbers of 4 bytes for each parameter of each model; of the model's own output layer too, as a bound."""
    one, both = (plan_lines(make_config(path, algorithm=algorithm))[6] for algorithm in ({"name": "grpo"}, PPO))
    assert "(weights, optimizer, gradients) and" in one
    assert "(weights, optimizer, gradients, critic) and" in both
    small = save_model(tmp_path / "small", hidden_size=16, intermediate_size=16)
    smaller = plan_lines(make_config(path, algorithm={**PPO, "critic_path": small}))[6]
    sizes = [float(line.split()[5]) for line in (one, smaller, both)]
    assert sizes[2] == pytest.approx(2 * sizes[0], rel=0.01)
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algorithm": {**PPO, "critic_warmup_steps": 3}}, "the policy would never be trained"),
        ({"algorithm": {**PPO, "advantages": "own:advantages"}}, "advantages"),
    ],
)
def test_what_cannot_be_run(path: str, sections: dict, message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make_config(path, **({"algorithm": PPO} | sections))


def test_bfloat16_has_float32_masters(path: str) -> None:
    config = make_config(path, model={"dtype": "bfloat16"}, algorithm=PPO)
    backend = make_backend(config)
    train(backend, config, BATCHES[:1])
    state = backend.state().tensors
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name, parameter in critic_of(backend).items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(state[f"critic/model/{name}"].bfloat16(), parameter)
