"""Every parallel layout against one process: loss, gradient norm, weights, probe, and the state that a resumed run takes up.

The gloo ranks of all layouts of one size run in one set of processes, since starting them is what takes time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import saved_by_ranks
from tests.stack.megatron_cases import delivered, make_megatron, save_model, with_routes
from tests.unit.fsdp_cases import advantages_of, largest_difference, make_batch, make_config, same_bits
from verst.config.schema import Config
from verst.errors import CheckpointError
from verst.observe.metrics import Tally, merged
from verst.observe.outliers import LAYER_US
from verst.training.checkpoints import CheckpointWriter, commit_checkpoint, load_state, step_path
from verst.training.distributed import init_distributed, leave_distributed
from verst.training.megatron.whole import whole_tensors
from verst.types import Batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(620)]  # two ranks go through all layouts in one go: two minutes on a quiet machine
STEPS = 4
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Case:
    family: str
    arguments: Mapping[str, Any]
    train: Mapping[str, Any]
    algorithm: Mapping[str, Any] = field(default_factory=lambda: {"name": "grpo"})


def case(family: str, *, recompute: bool = False, **arguments: Any) -> Case:
    return Case(family, arguments, {"gradient_checkpointing": recompute})


_KINDS = ("tensor_model", "pipeline_model", "expert_model", "context")
TP2, PP2, EP2, CP2 = (dict[str, Any]({f"{kind}_parallel_size": 2}) for kind in _KINDS)
SP: dict[str, Any] = {"sequence_parallel": True}
TWO: Mapping[str, Case] = {
    "tp2": case("qwen3", **TP2),
    "tp2 padded vocabulary": case("llama_tied", **TP2),
    "tp2 sp": case("qwen3", **TP2, **SP),
    "tp2 sp experts": case("qwen3_moe", **TP2, **SP),
    "tp2 latent": case("deepseek_v3_dense", **TP2),
    "tp2 sp latent": case("deepseek_v3", **TP2, **SP),
    "pp2": case("qwen3", **PP2),
    "pp2 tied": case("llama_tied", **PP2),
    "pp2 vpp2": case("qwen3", **PP2, num_virtual_stages_per_pipeline_rank=2),
    "pp2 experts": case("qwen3_moe", **PP2),
    "dp2": case("qwen3"),
    "dp2 plain optimizer": case("qwen3", use_distributed_optimizer=False),
    "dp2 overlap": case("qwen3", overlap_grad_reduce=True, overlap_param_gather=True),
    "ep2": case("qwen3_moe", **EP2),
    "ep2 latent": case("deepseek_v3", **EP2),
    "cp2": case("qwen3", **CP2),
    "cp2 latent": case("deepseek_v3", **CP2),
    "recompute": case("qwen3", recompute=True),
    "tp2 sp ep2": case("qwen3_moe", **TP2, **SP, **EP2, expert_tensor_parallel_size=1),
}
FOUR: Mapping[str, Case] = {
    "tp2 pp2 sp": case("qwen3", **TP2, **PP2, **SP),
    "tp2 cp2 sp": case("llama", **TP2, **CP2, **SP),
    "pp2 ep2": case("qwen3_moe", **PP2, **EP2),
    "dp2 tp2 sp etp2": case("deepseek_v3", **TP2, **SP),
}
SEQUENCES = Case("qwen3", CP2, {"minibatches": 2}, {"name": "gspo", "clip_low": 0.02, "clip_high": 0.02})
"""With ratios over whole samples, of which a context-parallel rank computes a part."""
ROUTED_TWO: Mapping[str, Case] = {
    "tp2 sp": case("qwen3_moe", **TP2, **SP),
    "tp2 sp ep2": case("qwen3_moe", **TP2, **SP, **EP2, expert_tensor_parallel_size=1),
    "pp2 recompute": case("qwen3_moe", **PP2, recompute=True),
    "pp2 vpp2": case("qwen3_moe", **PP2, num_virtual_stages_per_pipeline_rank=2),
    "pp2 vpp2 recompute": case("deepseek_v3", **PP2, num_virtual_stages_per_pipeline_rank=2, recompute=True),
    "dp2": case("qwen3_moe"),
    "ep2 recompute": case("deepseek_v3", **EP2, recompute=True),
    "cp2 recompute": case("deepseek_v3", **CP2, recompute=True),
}
ROUTED_FOUR: Mapping[str, Case] = {
    "pp2 ep2 recompute": case("qwen3_moe", **PP2, **EP2, recompute=True),
    "tp2 cp2 sp": case("qwen3_moe", **TP2, **CP2, **SP),
    "dp2 tp2 sp etp2 recompute": case("deepseek_v3", **TP2, **SP, recompute=True),
    "tp2 pp2 sp vpp2": case("qwen3_moe", **TP2, **PP2, **SP, num_virtual_stages_per_pipeline_rank=2),
}
"""Layouts that train on recorded routes, which are random, so that the live router would have chosen others."""
RESHARDED = {
    "tp2": "pp2",
    "dp2": "tp2 sp",
    "dp2 plain optimizer": "dp2",
    "pp2 vpp2": "dp2",
    "pp2 tied": "tp2 padded vocabulary",
    "tp2 padded vocabulary": "pp2 tied",
    "tp2 sp latent": "cp2 latent",
    "ep2": "tp2 sp experts",
    "tp2 sp ep2": "pp2 experts",
}
"""Layouts that save after two steps, and those that load and go on."""
GROWN = {"ep2": "pp2 ep2", "tp2": "tp2 pp2 sp"}
"""Layouts of two ranks that save, and those of four that go on."""
FAMILIES = sorted({c.family for c in (*TWO.values(), *FOUR.values())})


def config_of(paths: Mapping[str, str], chosen: Case) -> Config:
    kl = {"kl_coefficient": 0.1} if chosen.family == "llama_tied" else {}  # which keeps a reference model
    return make_config(
        paths[chosen.family],
        train={"lr": 1e-3, "microbatch_tokens": 40, "routes": "ignore", **chosen.train},
        algorithm={**chosen.algorithm, **kl},
    )


def batches(groups: int = 3) -> list[Batch]:
    return [make_batch(step, groups=groups, longest=20) for step in range(1, STEPS + 1)]


def run_step(backend: Any, config: Config, batch: Batch) -> Tally:
    tally = Tally().merge(backend.load_batch(batch).tally)
    for update in range(backend.num_updates):
        tally.merge(backend.forward_backward(update, advantages_of(config, batch, {})))
        tally.merge(backend.optimizer_step(update))
    return tally


def taken(backend: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.weights()}


def routed_config_of(paths: Mapping[str, str], chosen: Case) -> Config:
    """Many microbatches. One family is measured as it trains, with a loss that follows the routes, the other as it is scored."""
    latent = chosen.family == "deepseek_v3"
    return make_config(
        paths[chosen.family],
        train={"lr": 1e-3, "microbatch_tokens": 24, "epochs": 2 if latent else 1, **chosen.train},
        algorithm={"name": "grpo", "old_logprobs": "trainer" if latent else "behaviour"},
    )


# ---- what each rank does; results go to files, and the tests below judge them


def lend(backend: Any) -> None:
    """Between two steps all memory goes and comes back, and in between the weights can still be read."""
    before = taken(backend)
    backend.release_memory(weights=False)
    assert same_bits(taken(backend), before)
    backend.release_memory(weights=True)
    backend.resume_memory()


def run_layout(config: Config, arguments: Mapping[str, Any], rank: int, world: int) -> dict[str, Any]:
    backend = make_megatron(config, rank, world, **arguments)
    first = taken(backend)
    tallies = [run_step(backend, config, batch) for batch in batches()[:2]]
    middle = backend.state()
    tallies += [run_step(backend, config, batch) for batch in batches()[2:]]
    weights, probe = taken(backend), backend.logprobs(batches()[0].samples[0].tokens_T)
    state = backend.state()
    backend.load_state(middle)
    for batch in batches()[2:]:
        lend(backend)
        run_step(backend, config, batch)
    lend(backend)
    again = same_bits(state.tensors, backend.state().tensors) and same_bits(weights, taken(backend))
    return {"first": first, "tallies": tallies, "weights": weights, "probe": probe, "again": again, "state": middle}


def run_routed(config: Config, arguments: Mapping[str, Any], rank: int, world: int) -> dict[str, Any]:
    backend = make_megatron(config, rank, world, **arguments)
    kind = backend.routed_experts
    assert kind is not None
    tallies = [run_step(backend, config, delivered(with_routes(batch, kind), backend, config)) for batch in batches(groups=2)]
    return {"tallies": tallies, "weights": taken(backend)}


def save(backend: Any, directory: Path, rank: int, world: int) -> None:
    """A checkpoint after step 2, as a run writes it."""
    writer = CheckpointWriter(directory, 2, rank=rank, world=world)
    writer.begin(backend.state())
    records: list[Any] = [None] * world
    torch.distributed.all_gather_object(records, writer.finish())
    if rank == 0:
        commit_checkpoint(directory, 2, records, fingerprint={}, loop={}, keep=1)
    torch.distributed.barrier()


def load(config: Config, arguments: Mapping[str, Any], directory: Path, rank: int, world: int) -> Any:
    backend = make_megatron(config, rank, world, **arguments)
    backend.load_state(load_state(directory, 2, rank=rank, world=world))
    return backend


def go_on(backend: Any, config: Config) -> dict[str, Any]:
    """What it was loaded with, and what the remaining steps make of it."""
    loaded = taken(backend)
    tallies = [run_step(backend, config, batch) for batch in batches()[2:]]
    return {"loaded": loaded, "tallies": tallies, "weights": taken(backend)}


def run_resharded(config: Config, saving: Case, loading: Case, rank: int, directory: Path) -> dict[str, Any]:
    """Saved on one layout, loaded on another and saved again there, and loaded on the first: masters and moments must have their bits."""
    first = make_megatron(config, rank, 2, **saving.arguments)
    for batch in batches()[:2]:
        run_step(first, config, batch)
    state, saved = first.state(), taken(first)
    save(first, directory, rank, 2)
    second = load(config, loading.arguments, directory, rank, 2)
    save(second, directory / "again", rank, 2)
    results = go_on(second, config)
    back = load(config, saving.arguments, directory / "again", rank, 2).state()
    same = same_bits(state.tensors, back.tensors) and same_bits(saved, results["loaded"])
    counters = {key: value for key, value in state.values.items() if key not in ("rng", "layout", "pieces")}
    return results | {"same": same and all(back.values[key] == value for key, value in counters.items()), "saved": saved}


def run_skip(config: Config, rank: int, world: int) -> dict[str, Any]:
    """A loss that is not finite on one data-parallel rank only: both must skip."""
    backend = make_megatron(config, rank, world)
    before = taken(backend)
    batch = batches()[0]
    backend.load_batch(batch)
    assert backend._step is not None
    advantages = advantages_of(config, batch, {})
    advantages[backend._step.plan.updates[0].ranks[1][0][0]] = float("nan")
    backend.forward_backward(0, advantages)
    tally = backend.optimizer_step(0)
    return {"skipped": tally.report()["update/skipped"], "unchanged": same_bits(before, taken(backend)), "notes": list(tally.notes)}


def run_rank(rank: int, directory: str, address: str, world: int, paths: Mapping[str, str], former: str) -> None:
    torch.set_num_threads(1)
    init_distributed(rank, world, address, timeout_s=60)
    cases = TWO if world == 2 else FOUR
    results: dict[str, Any] = {}
    for name, chosen in cases.items():
        results[name] = run_layout(config_of(paths, chosen), chosen.arguments, rank, world)
    for name, chosen in (ROUTED_TWO if world == 2 else ROUTED_FOUR).items():
        results[f"{name} routed"] = run_routed(routed_config_of(paths, chosen), chosen.arguments, rank, world)
    if world == 2:
        results["sequences"] = run_layout(config_of(paths, SEQUENCES), SEQUENCES.arguments, rank, world)
        results["skip"] = run_skip(config_of(paths, TWO["dp2"]), rank, world)
        foreign = make_megatron(config_of(paths, TWO["pp2"]), rank, world, **PP2)
        with pytest.raises(CheckpointError, match=r"saved by 2 ranks of the megatron backend \(TP2\)"):
            foreign.load_state(results["tp2"]["state"])
        for saving, loading in RESHARDED.items():
            chosen = TWO[saving]
            results[f"{saving} to {loading}"] = run_resharded(
                config_of(paths, chosen), chosen, TWO[loading], rank, place(directory, saving)
            )
        halved = make_config(paths["qwen3"], model={"dtype": "bfloat16"}, train={"lr": 1e-3, "microbatch_tokens": 40})
        for saving in ("dp2 plain optimizer", "dp2"):  # whose masters lie beside the model's parameters, or are slices of them
            results[f"{saving}, bfloat16"] = run_resharded(halved, TWO[saving], TWO["tp2"], rank, place(directory, f"{saving} bfloat16"))
    for saving, loading in GROWN.items() if world == 4 else ():
        config = config_of(paths, FOUR[loading])
        results[f"{saving} to {loading}"] = go_on(load(config, FOUR[loading].arguments, place(former, saving), rank, world), config)
    torch.save(results, f"{directory}/rank{rank}.pt")
    leave_distributed()


def place(directory: str | Path, saving: str) -> Path:
    """Where a layout's checkpoint lies."""
    return Path(directory) / saving.replace(" ", "_")


# ---- the judges


def start(world: int, directory: Path, paths: Mapping[str, str], former: str = "") -> list[dict[str, Any]]:
    return saved_by_ranks(run_rank, directory, world, paths, former, world=world, limit_s=600, preload=(__name__,))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    return {family: save_model(directory / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of two ranks lie."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(paths: dict[str, str], saved: Path) -> list[dict[str, Any]]:
    return start(2, saved, paths)


@pytest.fixture(scope="module")
def four(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory, two: list[dict[str, Any]], saved: Path) -> list[dict[str, Any]]:
    return start(4, tmp_path_factory.mktemp("four"), paths, str(saved))


@pytest.fixture(scope="module")
def alone(paths: dict[str, str]) -> dict[str, Any]:
    """One process on each family, once."""
    results = {family: run_alone(config_of(paths, case(family))) for family in FAMILIES}
    leave_distributed()
    return results


def run_alone(config: Config) -> dict[str, Any]:
    backend = make_megatron(config)
    first = taken(backend)
    tallies = [run_step(backend, config, batch) for batch in batches()]
    return {"first": first, "tallies": tallies, "weights": taken(backend), "probe": backend.logprobs(batches()[0].samples[0].tokens_T)}


def judge(ranks: list[dict[str, Any]], name: str, expected: dict[str, Any]) -> None:
    results = [rank[name] for rank in ranks]
    assert same_bits(results[0]["first"], expected["first"]), "the model on disk is not what is exported"
    for result in results[1:]:
        assert same_bits(result["weights"], results[0]["weights"]), "ranks publish different tensors"
        assert (result["probe"] == results[0]["probe"]).all()
    assert all(result["again"] for result in results), "a resumed run has other bits"
    for step, one in enumerate(expected["tallies"]):
        together, report = merged([result["tallies"][step] for result in results]).report(), one.report()
        assert together.pop(LAYER_US, 1.0) > 0  # where ranks wait for each other, each measures its own pace
        assert together.keys() == report.keys()
        for metric in ("loss/total", "update/grad_norm"):
            assert together[metric] == pytest.approx(report[metric], rel=TOLERANCE, abs=TOLERANCE), (step, metric)
        for metric, value in report.items():
            assert together[metric] == pytest.approx(value, rel=2e-3, abs=2e-4), (step, metric)
    assert largest_difference(expected["first"], expected["weights"]) > 2e-3
    assert largest_difference(results[0]["weights"], expected["weights"]) < 2e-4
    assert abs(results[0]["probe"] - expected["probe"]).max() < 1e-4


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one(two: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    judge(two, name, alone[TWO[name].family])


def test_ratios_of_sequences_are_those_of_whole_samples(two: list[dict[str, Any]], paths: dict[str, str]) -> None:
    expected = run_alone(config_of(paths, SEQUENCES))
    leave_distributed()
    judge(two, "sequences", expected)
    assert any(tally.report()["policy/clipped_high"] > 0 for tally in expected["tallies"]), "no bound acts"


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(four: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    judge(four, name, alone[FOUR[name].family])


@pytest.fixture(scope="module")
def alone_routed(paths: dict[str, str]) -> dict[str, Any]:
    """One process under replay on each family that routes, once."""
    results = {}
    for family in ("qwen3_moe", "deepseek_v3"):
        results[family] = run_routed(routed_config_of(paths, case(family)), {}, 0, 1)
    leave_distributed()
    return results


def judge_routed(ranks: list[dict[str, Any]], name: str, expected: dict[str, Any]) -> None:
    results = [rank[f"{name} routed"] for rank in ranks]
    for step, one in enumerate(expected["tallies"]):
        together = merged([result["tallies"][step] for result in results])
        for metric in ("loss/total", "update/grad_norm"):
            assert together.report()[metric] == pytest.approx(one.report()[metric], rel=TOLERANCE, abs=TOLERANCE), (step, metric)
        assert together.report()["routes/replayed"] == 1.0
        told = [metric for metric in one.sums if metric.startswith("routes/")]
        assert {metric for metric in together.sums if metric.startswith("routes/")} == set(told)
        for metric in told:  # of each token and layer once
            if metric != "routes/bytes_per_token":  # which each pipeline stage tells alike
                assert together.weights[metric] == one.weights[metric], (step, metric)
            assert together.report()[metric] == pytest.approx(one.report()[metric], abs=0.02), (step, metric)
    assert expected["tallies"][0].report()["routes/differ"] > 0.5
    assert largest_difference(results[0]["weights"], expected["weights"]) < TOLERANCE


@pytest.mark.parametrize("name", ROUTED_TWO)
def test_two_ranks_replay_as_one(two: list[dict[str, Any]], alone_routed: dict[str, Any], name: str) -> None:
    judge_routed(two, name, alone_routed[ROUTED_TWO[name].family])


@pytest.mark.parametrize("name", ROUTED_FOUR)
def test_four_ranks_replay_as_one(four: list[dict[str, Any]], alone_routed: dict[str, Any], name: str) -> None:
    judge_routed(four, name, alone_routed[ROUTED_FOUR[name].family])


def judge_resumed(results: dict[str, Any], saved: Mapping[str, torch.Tensor], expected: dict[str, Any]) -> None:
    assert same_bits(results["loaded"], saved)
    assert largest_difference(saved, expected["first"]) > 1e-3
    assert largest_difference(results["weights"], expected["weights"]) < 2e-4


@pytest.mark.parametrize("saving", RESHARDED)
def test_another_layout_goes_on_from_a_checkpoint(two: list[dict[str, Any]], alone: dict[str, Any], saving: str) -> None:
    name, expected = f"{saving} to {RESHARDED[saving]}", alone[TWO[saving].family]
    for rank in two:
        assert rank[name]["same"], "masters or moments have other bits after their way to another layout and back"
        judge_resumed(rank[name], rank[name]["saved"], expected)
    for i, one in enumerate(expected["tallies"][2:]):
        together, report = merged([rank[name]["tallies"][i] for rank in two]).report(), one.report()
        for metric in ("loss/total", "update/grad_norm"):
            assert together[metric] == pytest.approx(report[metric], rel=TOLERANCE, abs=TOLERANCE), (i, metric)


@pytest.mark.parametrize("saving", ["dp2 plain optimizer", "dp2"])
def test_float32_masters_of_a_bfloat16_model_reach_another_layout(two: list[dict[str, Any]], saving: str) -> None:
    for rank in two:
        assert rank[f"{saving}, bfloat16"]["same"]
        assert same_bits(rank[f"{saving}, bfloat16"]["loaded"], rank[f"{saving}, bfloat16"]["saved"])


@pytest.mark.parametrize("saving", RESHARDED)
def test_the_whole_model_is_read_from_shards_without_ranks(
    two: list[dict[str, Any]], paths: dict[str, str], saved: Path, saving: str
) -> None:
    files = sorted(step_path(place(saved, saving), 2).glob("rank-*.safetensors"))
    found = dict(whole_tensors(files, paths[TWO[saving].family], torch.float32))
    assert same_bits(found, two[0][f"{saving} to {RESHARDED[saving]}"]["saved"])


def test_masters_are_rounded_as_the_trainer_rounds_them(two: list[dict[str, Any]], paths: dict[str, str], saved: Path) -> None:
    files = sorted(step_path(place(saved, "dp2 bfloat16"), 2).glob("rank-*.safetensors"))
    found = dict(whole_tensors(files, paths["qwen3"], torch.bfloat16))
    assert same_bits(found, two[0]["dp2, bfloat16"]["saved"])


@pytest.mark.parametrize("saving", GROWN)
def test_twice_as_many_ranks_go_on_from_a_checkpoint(
    two: list[dict[str, Any]], four: list[dict[str, Any]], alone: dict[str, Any], saving: str
) -> None:
    before = two[0][f"{saving} to {RESHARDED[saving]}"]["saved"]
    for rank in four:
        judge_resumed(rank[f"{saving} to {GROWN[saving]}"], before, alone[TWO[saving].family])


@pytest.mark.parametrize("saving", ["tp2", "ep2", "dp2", "pp2 tied"])
def test_one_rank_goes_on_from_a_checkpoint_of_two(
    two: list[dict[str, Any]], paths: dict[str, str], saved: Path, alone: dict[str, Any], saving: str
) -> None:
    config = config_of(paths, TWO[saving])
    results = go_on(load(config, {}, place(saved, saving), 0, 1), config)
    leave_distributed()
    judge_resumed(results, two[0][f"{saving} to {RESHARDED[saving]}"]["saved"], alone[TWO[saving].family])


def test_a_checkpoint_of_another_model_or_with_a_lost_shard_is_named(
    two: list[dict[str, Any]], paths: dict[str, str], saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"is of another model: .* of layer \d"):
        load(config_of(paths, case("qwen3_moe")), {}, place(saved, "tp2"), 0, 1)
    files = sorted(step_path(place(saved, "tp2"), 2).glob("rank-*.safetensors"))
    with pytest.raises(CheckpointError, match="is of another model"):
        list(whole_tensors(files, paths["qwen3_moe"], torch.float32))
    with pytest.raises(CheckpointError, match="is not whole: the shards of"):
        list(whole_tensors(files[:1], paths["qwen3"], torch.float32))
    state = load_state(place(saved, "tp2"), 2, rank=0, world=1)
    backend = make_megatron(config_of(paths, case("qwen3")))
    with pytest.raises(CheckpointError, match="is not whole: the shards of"):
        backend.load_state(dataclasses.replace(state, files=state.files[:1]))
    leave_distributed()


def test_a_loss_that_is_not_finite_on_one_rank_skips_on_both(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert (rank["skip"]["skipped"], rank["skip"]["unchanged"]) == (1.0, True)
        (line,) = rank["skip"]["notes"]
        assert "is skipped: trainer rank 1: sample " in line
        assert "the advantage is not finite; the first gradient that is not finite: " in line
        assert "embedding.word_embeddings.weight (" in line, "of the rank whose part of the optimizer it is"
        assert rank["skip"]["notes"] == two[0]["skip"]["notes"]
