"""The critic of the `megatron` backend: one rank against the `fsdp` backend's, parallel layouts against one rank, and its state on the way
from one layout to another.

The gloo ranks of all layouts of one size run in one set of processes, since starting them is what takes time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.ranks import saved_by_ranks
from tests.stack.megatron_cases import make_megatron, save_model
from tests.stack.test_megatron_ranks import CP2, EP2, PP2, SP, TP2, lend, load, place, save, taken
from tests.unit.fsdp_cases import largest_difference, make_backend, make_batch, make_config, same_bits, train
from verst.config.schema import Config
from verst.errors import CheckpointError, ModelError
from verst.observe.metrics import merged
from verst.training.distributed import init_distributed, leave_distributed
from verst.training.fsdp_critic import FsdpCritic
from verst.training.megatron.whole import whole_tensors

TOLERANCE = 5e-5
BATCHES = [make_batch(step, groups=3, longest=20) for step in (1, 2, 3)]
TWO: Mapping[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("qwen3", TP2),
    "tp2 sp": ("qwen3", TP2 | SP),
    "pp2": ("qwen3", PP2),
    "pp2 tied": ("llama_tied", PP2),
    "pp2 vpp2": ("qwen3", PP2 | {"num_virtual_stages_per_pipeline_rank": 2}),
    "cp2": ("qwen3", CP2),
    "dp2": ("qwen3", {}),
    "dp2 overlap": ("qwen3", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "ep2": ("qwen3_moe", EP2),
}
FOUR: Mapping[str, tuple[str, dict[str, Any]]] = {"tp2 pp2 sp": ("qwen3", TP2 | PP2 | SP), "tp2 cp2 sp": ("qwen3", TP2 | CP2 | SP)}
RESHARDED = {"tp2": "pp2", "pp2 vpp2": "dp2", "dp2": "tp2 sp", "ep2": "ep2"}
"""Layouts that save after two steps, and those that load and go on."""


def config_of(path: str, **options: Any) -> Config:
    ppo = {"name": "ppo", "critic_lr": 2e-3, "gae_lambda": 0.9} | options
    return make_config(path, train={"lr": 1e-3, "microbatch_tokens": 40, "routes": "ignore"}, algorithm=ppo)


def of_all(own: Mapping[int, Any]) -> dict[int, Any]:
    if not torch.distributed.is_initialized():
        return dict(own)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, dict(own))
    assert sum(map(len, found)) == 6, "a value was told twice, or not at all"
    return {i: values for part in found for i, values in part.items()}


def critic_of(backend: Any) -> dict[str, torch.Tensor]:
    """Whole tensors by Hugging Face name. A collective."""
    backend._settle()
    return {name: tensor.clone() for name, tensor in backend._critic.tensors.full()}


# ---- what each rank does; results go to files, and the tests below judge them


def run_layout(config: Config, arguments: Mapping[str, Any], rank: int, world: int, directory: Path) -> dict[str, Any]:
    backend = make_megatron(config, rank, world, **arguments)
    tallies = train(backend, config, BATCHES[:2], all_values=of_all)
    middle = backend.state()
    if world > 1:
        save(backend, directory, rank, world)
    tallies += train(backend, config, BATCHES[2:], all_values=of_all)
    found = {"tallies": tallies, "weights": taken(backend), "critic": critic_of(backend)}
    state = backend.state()
    backend.load_state(middle)
    lend(backend)
    train(backend, config, BATCHES[2:], all_values=of_all)
    return found | {"again": same_bits(state.tensors, backend.state().tensors)}


def run_resharded(config: Config, arguments: Mapping[str, Any], rank: int, directory: Path) -> dict[str, Any]:
    backend = load(config, arguments, directory, rank, 2)
    tallies = train(backend, config, BATCHES[2:], all_values=of_all)
    return {"tallies": tallies, "weights": taken(backend), "critic": critic_of(backend)}


def run_rank(rank: int, directory: str, address: str, world: int, paths: Mapping[str, str]) -> None:
    torch.set_num_threads(1)
    init_distributed(rank, world, address, timeout_s=60)
    results: dict[str, Any] = {}
    for name, (family, arguments) in (TWO if world == 2 else FOUR).items():
        results[name] = run_layout(config_of(paths[family]), arguments, rank, world, place(directory, name))
    for saving, loading in RESHARDED.items() if world == 2 else ():
        family, arguments = TWO[loading]
        results[f"{saving} to {loading}"] = run_resharded(config_of(paths[family]), arguments, rank, place(directory, saving))
    torch.save(results, f"{directory}/rank{rank}.pt")
    leave_distributed()


# ---- the judges


def start(world: int, directory: Path, paths: Mapping[str, str]) -> list[dict[str, Any]]:
    return saved_by_ranks(run_rank, directory, world, paths, world=world, limit_s=600, preload=(__name__,))


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    yield
    leave_distributed()  # Megatron makes a group even of one rank


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    return {family: save_model(directory / family, family) for family in ("qwen3", "llama_tied", "qwen3_moe")}


@pytest.fixture(scope="module")
def alone(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process on each family, once."""
    found = {family: run_layout(config_of(path), {}, 0, 1, tmp_path_factory.mktemp("alone")) for family, path in paths.items()}
    leave_distributed()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of two ranks lie."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(paths: dict[str, str], saved: Path) -> list[dict[str, Any]]:
    return start(2, saved, paths)


@pytest.fixture(scope="module")
def four(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start(4, tmp_path_factory.mktemp("four"), paths)


@pytest.mark.parametrize("family", ["qwen3", "llama_tied", "qwen3_moe"])
def test_one_rank_equals_the_fsdp_backend(paths: dict[str, str], alone: dict[str, Any], family: str) -> None:
    config = config_of(paths[family])
    fsdp = make_backend(config)
    assert isinstance(fsdp._critic, FsdpCritic)
    tallies = train(fsdp, config, BATCHES)
    critic = {name: parameter.detach() for name, parameter in fsdp._critic.parameters.items()}
    for theirs, ours in zip(tallies, alone[family]["tallies"], strict=True):
        for metric in ("loss/total", "critic/loss", "critic/clipped", "critic/grad_norm", "critic/lr", "update/grad_norm"):
            assert ours.report()[metric] == pytest.approx(theirs.report()[metric], rel=1e-4, abs=1e-5), metric
    if family != "qwen3_moe":  # whose experts transformers keeps in one tensor
        assert largest_difference(alone[family]["critic"], critic) < TOLERANCE
    assert alone[family]["critic"].keys() == dict(own_files(paths[family])).keys()
    assert alone[family]["again"]


def own_files(path: str) -> Iterator[tuple[str, None]]:
    """The names in the files of a model, with a critic's head in place of the language model's."""
    from safetensors import safe_open

    with safe_open(f"{path}/model.safetensors", "pt") as file:
        yield from ((name, None) for name in file.keys() if name != "lm_head.weight")  # noqa: SIM118
    yield "score.weight", None


def judge(ranks: list[dict[str, Any]], name: str, expected: dict[str, Any], steps: int = 3) -> None:
    results = [rank[name] for rank in ranks]
    for i, one in enumerate(expected["tallies"][-steps:]):
        together, report = merged([result["tallies"][i] for result in results]), one.report()
        for metric in ("loss/total", "update/grad_norm", "critic/loss", "critic/clipped", "critic/grad_norm", "critic/skipped"):
            assert together.report()[metric] == pytest.approx(report[metric], rel=2e-4, abs=TOLERANCE), (i, metric)
        assert together.weights["critic/loss"] == pytest.approx(one.weights["critic/loss"]), "a loss was told twice, or not at all"
    for result in results:
        assert largest_difference(result["weights"], expected["weights"]) < TOLERANCE
        assert largest_difference(result["critic"], expected["critic"]) < 2 * TOLERANCE  # its rate is twice the policy's
        assert same_bits(result["critic"], results[0]["critic"])


@pytest.mark.slow
@pytest.mark.timeout(620)
@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one(two: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    judge(two, name, alone[TWO[name][0]])
    assert all(rank[name]["again"] for rank in two), "a state that is taken up again has other bits"


@pytest.mark.slow
@pytest.mark.timeout(620)
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(four: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    judge(four, name, alone[FOUR[name][0]])
    assert all(rank[name]["again"] for rank in four)


@pytest.mark.slow
@pytest.mark.timeout(620)
@pytest.mark.parametrize("saving", RESHARDED)
def test_another_layout_goes_on_with_the_critic_of_a_checkpoint(two: list[dict[str, Any]], alone: dict[str, Any], saving: str) -> None:
    judge(two, f"{saving} to {RESHARDED[saving]}", alone[TWO[saving][0]], steps=1)


@pytest.mark.slow
@pytest.mark.timeout(620)
def test_one_rank_takes_the_critic_of_two_and_the_export_has_none(two: list[dict[str, Any]], paths: dict[str, str], saved: Path) -> None:
    config = config_of(paths["qwen3"])
    ends = []
    for name in ("tp2", "pp2"):
        backend = load(config, {}, place(saved, name), 0, 1)
        ends.append((taken(backend), critic_of(backend)))
        leave_distributed()
    (policy, critic), (other_policy, other_critic) = ends
    assert largest_difference(policy, other_policy) < TOLERANCE
    assert largest_difference(critic, other_critic) < 2 * TOLERANCE
    files = sorted((place(saved, "tp2") / "step-00000002").glob("rank-*.safetensors"))
    assert same_bits(dict(whole_tensors(files, paths["qwen3"], torch.float32)), policy)


def test_a_reward_model_gives_its_head_too(paths: dict[str, str], tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(paths["qwen3"], num_labels=1)
    reward_model = transformers.AutoModelForSequenceClassification.from_config(config)
    reward_model.save_pretrained(tmp_path / "reward")
    backend = make_megatron(config_of(paths["qwen3"], critic_path=str(tmp_path / "reward")))
    assert same_bits(critic_of(backend), dict(reward_model.requires_grad_(False).named_parameters()))


def test_a_state_without_a_critic_and_a_model_of_another_size_are_refused(paths: dict[str, str], tmp_path: Path) -> None:
    without = make_megatron(make_config(paths["qwen3"], train={"lr": 1e-3}))
    with_critic = make_megatron(config_of(paths["qwen3"]))
    with pytest.raises(CheckpointError, match="it has no critic, and this run one"):
        with_critic.load_state(without.state())
    with pytest.raises(CheckpointError, match="it has a critic, and this run none"):
        without.load_state(with_critic.state())
    small = save_model(tmp_path / "small", intermediate_size=64)
    with pytest.raises(ModelError, match=r"algorithm\.critic_path .*small: .* do not fit"):
        make_megatron(config_of(paths["qwen3"], critic_path=small))
