"""Two sharded ranks over gloo against one plain rank. All scenarios run in one pair of processes, since starting it is what takes time:
these tests are `slow`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import saved_by_ranks
from tests.unit.fsdp_cases import (
    BATCHES,
    advantages_of,
    branched,
    largest_difference,
    make_backend,
    make_batch,
    make_config,
    same_bits,
    save_model,
    train,
    weights_of,
    with_routes,
)
from verst.config.schema import Config
from verst.data.packing import plan_step
from verst.errors import CheckpointError, DeadlineExceeded, InvariantViolation
from verst.observe.metrics import merged
from verst.observe.outliers import LAYER_US
from verst.training.distributed import Rendezvous, init_distributed, leave_distributed, own_address, own_rows
from verst.training.fsdp import FsdpBackend
from verst.training.state import RankState
from verst.types import Batch, RoutedExperts


def uneven_batch(step: int) -> Batch:
    """Three samples, of which no two fit a microbatch of 16 tokens: the second round has work for one rank only."""
    long = [s for s in make_batch(step, groups=8).samples if len(s.tokens_T) > 8]
    return Batch(step, (0,), tuple(replace(s, group=0) for s in long[:3]))


UNEVEN = [uneven_batch(step) for step in (1, 2, 3)]
BRANCHED = [branched(batch) for batch in BATCHES]
ROUTED = [with_routes(batch, RoutedExperts(layers=2, experts=4, chosen=2)) for batch in (*BATCHES[:2], UNEVEN[2])]
TOLERANCE = 5e-5  # of weights that moved by up to 0.03; see test_fsdp_backend on AdamW and float32 noise


def configs(path: str, tied: str, moe: str) -> dict[str, Config]:
    kl = {"name": "grpo", "kl_coefficient": 0.1}
    return {
        "plain": make_config(path),
        "updates": make_config(path, train={"minibatches": 2, "epochs": 2, "schedule": "cosine"}, algorithm=kl),
        "tied": make_config(tied, train={"gradient_checkpointing": True}, algorithm=kl | {"kl_in": "reward"}),
        "uneven": make_config(path, train={"microbatch_tokens": 16}),
        "critic": make_config(tied, train={"minibatches": 2, "gradient_checkpointing": True}, algorithm={"name": "ppo"}),
        "critic_uneven": make_config(path, train={"microbatch_tokens": 16}, algorithm={"name": "ppo"}),
        "sequences": make_config(path, train={"minibatches": 2}, algorithm={"name": "gspo", "clip_low": 0.02, "clip_high": 0.02}),
        "branches": make_config(
            path, train={"minibatches": 2, "microbatch_tokens": 16}, algorithm=kl | {"kl_in": "reward", "aggregate": "sequence_mean"}
        ),
        "pairs": make_config(path, train={"minibatches": 2, "epochs": 2}, algorithm={"name": "online_dpo", "beta": 0.5}),
        "routed": make_config(moe, train={"minibatches": 2, "gradient_checkpointing": True}, algorithm=kl),
        "routed_uneven": make_config(moe, train={"microbatch_tokens": 16}),
        "bfloat16": make_config(path, model={"dtype": "bfloat16"}, train={"lr": 1e-3}),
    }


def batches_of(name: str) -> list[Batch]:
    own = {"branches": BRANCHED, "uneven": UNEVEN, "critic_uneven": UNEVEN, "routed": ROUTED[:2], "routed_uneven": ROUTED[2:]}
    return own.get(name, BATCHES)


# ---- what each of the two ranks does; results go to files, and the tests below judge them


def of_both(own: Mapping[int, Any]) -> dict[int, Any]:
    found: list[dict[int, Any] | None] = [None, None]
    torch.distributed.all_gather_object(found, dict(own))
    return {k: v for part in found if part for k, v in part.items()}


def run_scenario(name: str, config: Config, rank: int) -> dict[str, Any]:
    backend = make_backend(config, rank, 2)
    kl: list[Mapping[int, float]] = []

    def exchanged(own: Mapping[int, float]) -> dict[int, float]:
        """Advantages need every rank's KL; for this test each rank computes all of them from the shared KL of both."""
        kl.append(own)
        return of_both(own)

    tallies = train(backend, config, batches_of(name), all_ranks=exchanged, all_values=of_both)
    probe = backend.logprobs(BATCHES[0].samples[0].tokens_T)
    return {"tallies": tallies, "kl": kl, "weights": weights_of(backend), "state": backend.state(), "probe": probe}


def run_skips(config: Config, rank: int) -> dict[str, Any]:
    """A loss that is not finite on one rank only: both must skip, and both go on."""
    backend = make_backend(config, rank, 2)
    before = backend.state()
    backend.load_batch(BATCHES[0])
    advantages = advantages_of(config, BATCHES[0], {})
    plan = plan_step([len(s.tokens_T) for s in BATCHES[0].samples], [s.group for s in BATCHES[0].samples], **_plan_options(config))
    advantages[plan.updates[0].ranks[1][0][0]] = float("nan")  # a sample of rank 1
    backend.forward_backward(0, advantages)
    tally = backend.optimizer_step(0)
    unchanged = same_bits(before.tensors, backend.state().tensors)
    return {"skipped": tally.report()["update/skipped"], "unchanged": unchanged, "notes": list(tally.notes)}


def _plan_options(config: Config) -> dict[str, Any]:
    return {"minibatches": 1, "epochs": 1, "ranks": 2, "microbatch_tokens": config.train.microbatch_tokens}


def lend(backend: FsdpBackend) -> None:
    """Between two steps all memory goes and comes back, and in between the weights can still be read."""
    before = weights_of(backend)
    backend.release_memory(weights=False)
    assert same_bits(weights_of(backend), before)
    shards = [parameter.to_local().untyped_storage() for parameter in backend._parameters.values()]  # type: ignore[operator]
    backend.release_memory(weights=True)
    assert sum(shard.nbytes() for shard in shards) == 0
    backend.resume_memory()
    assert same_bits(weights_of(backend), before)


def run_resume(config: Config, rank: int, single: RankState) -> dict[str, Any]:
    """Own shards in the middle of a run, then the full tensors of a one-rank checkpoint."""
    undisturbed = make_backend(config, rank, 2)
    train(undisturbed, config, BATCHES[:1])
    middle = undisturbed.state()
    train(undisturbed, config, BATCHES[1:])
    resumed = make_backend(config, rank, 2)
    resumed.load_state(middle)
    for batch in BATCHES[1:]:
        lend(resumed)
        train(resumed, config, [batch])
    lend(resumed)
    same = same_bits(undisturbed.state().tensors, resumed.state().tensors)
    resumed.load_state(single)
    taken = all(torch.equal(t, own_rows(single.tensors[n], rank, 2)) for n, t in resumed.state().tensors.items())
    train(resumed, config, BATCHES[1:])
    return {"same": same, "taken": taken, "weights": weights_of(resumed)}


def run_rank(rank: int, directory: str, address: str, again: str, paths: tuple[str, str, str]) -> None:
    torch.set_num_threads(1)
    init_distributed(rank, 2, address, timeout_s=60)
    results: dict[str, Any] = {name: run_scenario(name, config, rank) for name, config in configs(*paths).items()}
    results["skips"] = run_skips(configs(*paths)["plain"], rank)
    single = torch.load(f"{directory}/single.pt", weights_only=False)
    # As after the death of a peer: the group goes, the process stays, and a new backend is built on a new group.
    leave_distributed()
    init_distributed(rank, 2, again, timeout_s=60)
    results["resume"] = run_resume(configs(*paths)["plain"], rank, single)
    torch.save(results, f"{directory}/rank{rank}.pt")
    leave_distributed()


# ---- the judges


@dataclass(frozen=True)
class Results:
    paths: tuple[str, str, str]
    ranks: list[dict[str, Any]]

    def config(self, name: str) -> Config:
        return configs(*self.paths)[name]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("ranks")
    paths = (
        save_model(directory / "llama"),
        save_model(directory / "tied", "llama_tied", vocab_size=65),
        save_model(directory / "moe", "qwen3_moe"),
    )
    config = configs(*paths)["plain"]
    backend = make_backend(config)
    train(backend, config, BATCHES[:1])
    torch.save(backend.state(), directory / "single.pt")
    again = Rendezvous()
    return Results(paths, saved_by_ranks(run_rank, directory, again.address, paths, limit_s=200))


def single_rank(config: Config, batches: list[Batch]) -> tuple[FsdpBackend, list[Any]]:
    backend = make_backend(config)
    return backend, train(backend, config, batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain", "updates", "tied", "uneven", "critic", "critic_uneven", "sequences", "branches", "routed", "routed_uneven"]
)
def test_two_ranks_equal_one(results: Results, name: str) -> None:
    config = results.config(name)
    start = weights_of(make_backend(config))
    backend, tallies = single_rank(config, batches_of(name))
    expected = weights_of(backend)
    assert largest_difference(start, expected) > 0.01
    first, second = (rank[name] for rank in results.ranks)
    assert same_bits(first["weights"], second["weights"]), "ranks publish different tensors"
    assert largest_difference(first["weights"], expected) < TOLERANCE
    torch.testing.assert_close(
        torch.from_numpy(first["probe"]), torch.from_numpy(backend.logprobs(BATCHES[0].samples[0].tokens_T)), atol=5e-4, rtol=0
    )
    for step, alone in enumerate(tallies):
        together, alone = merged([first["tallies"][step], second["tallies"][step]]).report(), alone.report()
        assert together.pop(LAYER_US) > 0  # two ranks wait for each other, so each measures its own pace
        assert together.keys() == alone.keys()
        for metric, value in alone.items():
            assert together[metric] == pytest.approx(value, rel=2e-3, abs=2e-4), (step, metric)
        if name.startswith("routed"):
            assert alone["routes/replayed"] == 1.0


@pytest.mark.slow
def test_the_uneven_scenario_has_a_dummy_microbatch(results: Results) -> None:
    samples, config = UNEVEN[0].samples, results.config("uneven")
    plan = plan_step([len(s.tokens_T) for s in samples], [s.group for s in samples], **_plan_options(config))
    assert () in {microbatch for rank in plan.updates[0].ranks for microbatch in rank}


@pytest.mark.slow
def test_reference_kl_of_the_ranks_covers_every_sample_once(results: Results) -> None:
    for step in range(3):
        first, second = (rank["tied"]["kl"][step] for rank in results.ranks)
        assert not first.keys() & second.keys()
        assert first.keys() | second.keys() == set(range(8))


@pytest.mark.slow
def test_bfloat16_shards_publish_rounded_masters_close_to_one_rank(results: Results) -> None:
    backend, _ = single_rank(results.config("bfloat16"), BATCHES)
    expected, found = weights_of(backend), results.ranks[0]["bfloat16"]["weights"]
    joined = joined_state([rank["bfloat16"]["state"] for rank in results.ranks])
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, joined.tensors[f"model/{name}"].bfloat16())
    # Gradients of bfloat16 microbatches differ in their third digit, and AdamW's first steps move by their sign alone: up to 3 x 2 x 1e-3.
    differences = torch.cat([(found[n].float() - w.float()).abs().flatten() for n, w in expected.items()])
    assert float(differences.mean()) < 5e-4


def joined_state(shards: list[RankState]) -> RankState:
    tensors = {name: torch.cat([shard.tensors[name] for shard in shards]) for name in shards[0].tensors}
    return RankState(tensors, shards[0].values, shards[0].full_shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "tied", "critic"])
def test_shards_joined_along_dim_0_are_the_state_of_one_rank(results: Results, name: str) -> None:
    """`tied` has 65 vocabulary rows, so that its shards differ in size."""
    joined = joined_state([rank[name]["state"] for rank in results.ranks])
    assert {n: tuple(t.shape) for n, t in joined.tensors.items()} == joined.full_shapes
    config = results.config(name)
    backend, _ = single_rank(config, BATCHES)
    alone = backend.state()
    assert largest_difference(joined.tensors, alone.tensors) < TOLERANCE
    assert joined.values["update"] == alone.values["update"] == 3 * backend.num_updates
    backend.load_state(joined)
    assert same_bits(backend.state().tensors, joined.tensors)
    assert same_bits(weights_of(backend), results.ranks[0][name]["weights"])


@pytest.mark.slow
def test_a_lone_shard_is_refused_by_one_rank(results: Results) -> None:
    backend = make_backend(results.config("plain"))
    with pytest.raises(CheckpointError, match="join the shards"):
        backend.load_state(results.ranks[0]["plain"]["state"])


@pytest.mark.slow
def test_a_loss_broken_on_one_rank_is_skipped_on_both(results: Results) -> None:
    assert [(rank["skips"]["skipped"], rank["skips"]["unchanged"]) for rank in results.ranks] == [(1.0, True)] * 2
    (line,), other = (rank["skips"]["notes"] for rank in results.ranks)
    assert other == [line]
    assert "is skipped: trainer rank 1: sample " in line
    assert "the advantage is not finite; the first gradient that is not finite: model.embed_tokens.weight (" in line


@pytest.mark.slow
def test_shards_resume_bit_for_bit_and_take_a_checkpoint_of_one_rank(results: Results) -> None:
    backend, _ = single_rank(results.config("plain"), BATCHES)
    for rank in results.ranks:
        assert rank["resume"]["same"]
        assert rank["resume"]["taken"]
        assert largest_difference(rank["resume"]["weights"], weights_of(backend)) < TOLERANCE


# ---- in this process


def test_a_rank_without_its_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvariantViolation, match="call init_distributed first"):
        make_backend(make_config(str(tmp_path)), rank=0, world=2)


@pytest.mark.slow
def test_peers_that_never_come_are_named() -> None:
    meeting, start = Rendezvous(), time.monotonic()
    with pytest.raises(DeadlineExceeded, match=rf"trainer rank 0 waited 1 s at {meeting.address} for the other 1 of 2 ranks"):
        init_distributed(0, 2, meeting.address, timeout_s=1)
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_a_meeting_place_that_is_gone_is_named() -> None:
    meeting = Rendezvous()
    address = meeting.address
    del meeting
    with pytest.raises(DeadlineExceeded, match=rf"trainer rank 1 waited 1 s at {address} for the other 1 of 2 ranks"):
        init_distributed(1, 2, address, timeout_s=1)


def test_the_port_of_a_meeting_stays_taken() -> None:
    """On every address of this machine. Two ranks once found that another process had it: it had been looked up only, on one address."""
    meeting = Rendezvous()
    port = int(meeting.address.rpartition(":")[2])
    for host in ("", "127.0.0.1", own_address()):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((host, port))


def test_one_rank_joins_no_group() -> None:
    init_distributed(0, 1, "nowhere:1", timeout_s=1)
    assert not torch.distributed.is_initialized()
    leave_distributed()


def test_own_rows_are_torch_chunks() -> None:
    for rows in range(1, 9):
        full = torch.arange(rows)
        for world in (1, 2, 3, 4):
            chunks = [*torch.chunk(full, world), *[full[:0]] * world][:world]
            assert [own_rows(full, rank, world).tolist() for rank in range(world)] == [c.tolist() for c in chunks]
