"""What the plugin says about weights, on models that fuse and shard as SGLang's do, and what the engine makes of it. No server."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from verst.errors import WeightMismatch
from verst.rollout.sglang.checkpoint import check_fits, headers
from verst.rollout.sglang.loading import load
from verst.rollout.sglang.plugin import merged
from verst.types import Manifest
from verst.weights.files import FileUpdate, describe, publish
from verst.weights.group import GroupUpdate
from verst.weights.layout import lay_out_buckets
from verst.weights.names import parts

EXPERTS, HIDDEN, INNER = 4, 6, 8


def weights() -> dict[str, torch.Tensor]:
    """As transformers names them: experts fused."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "model.embed_tokens.weight": (10, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": (8, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (4, HIDDEN),
        "model.layers.0.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
        "model.layers.0.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
        "model.norm.weight": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Fused(torch.nn.Module):
    """One rank of a model that keeps q and k in one parameter, and gates and ups of its experts in another, each split over ranks."""

    def __init__(self, rank: int = 0, ranks: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks

        def new(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

        self.embed, self.norm = new(12, HIDDEN), new(HIDDEN)  # padded
        self.qk = new(8 // ranks + 4, HIDDEN)  # few key heads: every rank has all of them
        self.w13, self.w2 = new(EXPERTS, 2 * INNER // ranks, HIDDEN), new(EXPERTS, HIDDEN, INNER // ranks)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.place(name, tensor)

    def place(self, name: str, tensor: torch.Tensor) -> None:
        inner, q = INNER // self.ranks, 8 // self.ranks
        if "experts" in name:
            expert = int(name.split(".")[5])
            if "down" in name:
                self.w2.data[expert].copy_(tensor.narrow(1, self.rank * inner, inner))
            else:
                start = 0 if "gate" in name else inner
                self.w13.data[expert].narrow(0, start, inner).copy_(tensor.narrow(0, self.rank * inner, inner))
        elif "q_proj" in name:
            self.qk.data[:q].copy_(tensor.narrow(0, self.rank * q, q))
        elif "k_proj" in name:
            self.qk.data[q:].copy_(tensor)
        elif "embed" in name:
            self.embed.data[: len(tensor)].copy_(tensor)
        else:
            self.norm.data.copy_(tensor)


def loaded(model: Fused, update: FileUpdate, entries: Any = None) -> dict[str, str]:
    return merged([load(model, update)], entries or update.manifest.entries)


def differing(found: dict[str, str], manifest: Manifest) -> set[str]:
    return {entry.name for entry in manifest.entries if found[entry.name] != entry.checksum}


@pytest.fixture
def update(tmp_path: Path) -> FileUpdate:
    return FileUpdate(publish(1, iter(weights().items()), tmp_path))


def test_fused_parameters_are_read_back_by_published_name(update: FileUpdate):
    model = Fused()
    assert not differing(loaded(model, update), update.manifest)
    gate_up = weights()["model.layers.0.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(model.w13.data, gate_up)  # gate first, as transformers keeps them


def test_ranks_together_hold_what_was_published_and_one_wrong_slice_is_named(update: FileUpdate):
    ranks = [Fused(rank, 2) for rank in range(2)]
    replies = [load(model, update) for model in ranks]
    assert "model.layers.0.self_attn.q_proj.weight" in replies[0]["boxes"]
    assert "model.layers.0.self_attn.k_proj.weight" not in replies[0]["boxes"]
    assert not differing(merged(replies, update.manifest.entries), update.manifest)

    class Late(Fused):
        """Something writes over its shard after it was loaded."""

        def place(self, name: str, tensor: torch.Tensor) -> None:
            super().place(name, tensor)
            if name == "model.norm.weight":
                self.w2.data[1, 2, 3] += 1

    replies = [load(Fused(0, 2), update), load(Late(1, 2), update)]
    assert differing(merged(replies, update.manifest.entries), update.manifest) == {"model.layers.0.mlp.experts.down_proj"}


class Fed:
    """A member of a weight group that has what is broadcast at once: tensors share a buffer, which the next bucket but one overwrites.

    `kept`: buffers of the version before, used again as those of a real member are.
    """

    rank, device = 1, torch.device("cpu")

    def __init__(
        self, version: int, tensors: dict[str, torch.Tensor], bucket_bytes: int = 512, kept: list[torch.Tensor] | None = None
    ) -> None:
        manifest = describe(version, iter(tensors.items()))
        self._kept = [] if kept is None else kept
        self.views: dict[Any, list[torch.Tensor]] = {}
        self._buckets = iter(lay_out_buckets(manifest.entries, bucket_bytes))
        self._tensors = tensors
        self.update = GroupUpdate(manifest, bucket_bytes, 5.0).at(self)

    def buffers(self, nbytes: int, count: int, deadline: float) -> list[torch.Tensor]:
        if not self._kept:
            self._kept += [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]
        return self._kept

    def broadcast(self, buffer: torch.Tensor, deadline: float) -> None:
        bucket = next(self._buckets)
        for entry, start in zip(bucket.entries, bucket.offsets, strict=True):
            buffer[start : start + entry.nbytes] = self._tensors[entry.name].contiguous().view(-1).view(torch.uint8)

    def finish(self, work: None, deadline: float, what: str) -> None: ...

    def release(self, work: None) -> None: ...

    def close(self) -> None: ...


class Counting(Fused):
    """Counts the tensors that go through the loader."""

    placed = 0

    def place(self, name: str, tensor: torch.Tensor) -> None:
        self.placed += 1
        super().place(name, tensor)


class Deriving(Counting):
    """Keeps something it computes from weights, as SGLang's DeepSeek does."""

    def post_load_weights(self) -> None: ...


class Scaling(Counting):
    def place(self, name: str, tensor: torch.Tensor) -> None:
        super().place(name, tensor)
        if "norm" in name:
            self.norm.data.copy_(self.norm.data + 0)  # a write that no announced tensor explains


@pytest.mark.parametrize("ranks", [1, 2])
def test_later_versions_are_copied_where_the_loader_put_the_first(ranks: int):
    models = [Counting(rank, ranks) for rank in range(ranks)]
    for version in (1, 2, 3):
        tensors = {name: tensor + version for name, tensor in weights().items()}
        feds = [Fed(version, tensors) for _ in models]
        replies = [load(model, fed.update) for model, fed in zip(models, feds, strict=True)]
        entries = feds[0].update.manifest.entries
        assert merged(replies, entries) == {entry.name: entry.checksum for entry in entries}
        assert {model.placed for model in models} == {len(tensors) + 3 * EXPERTS - 2}
        for model in models:
            torch.testing.assert_close(model.norm.data, tensors["model.norm.weight"])


class Layers(torch.nn.Module):
    """Layers of one form, so that their tensors come at the same places of the two buffers in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(EXPERTS, HIDDEN), requires_grad=False) for _ in range(5))

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.layers[int(name.split(".")[2])].data.copy_(tensor)


def test_buckets_that_look_alike_go_to_their_own_places():
    model, kept = Layers(), []
    for version in (1, 2, 3):
        tensors = {f"model.layers.{i}.mlp.weight": torch.full((EXPERTS, HIDDEN), 10.0 * version + i) for i in range(5)}
        fed = Fed(version, tensors, bucket_bytes=EXPERTS * HIDDEN * 4, kept=kept)
        found = merged([load(model, fed.update)], fed.update.manifest.entries)
        assert not differing(found, fed.update.manifest)
        assert [int(layer[0, 0]) for layer in model.layers] == [10 * version + i for i in range(5)]


@pytest.mark.parametrize("kind", [Deriving, Scaling])
def test_a_loader_that_does_more_than_copy_loads_every_version(kind: type[Counting]):
    model = kind()
    counts = []
    for version in (1, 2):
        load(model, Fed(version, weights()).update)
        counts.append(model.placed)
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_direct_copy_is_verified_like_a_load(ranks: int, monkeypatch: pytest.MonkeyPatch):
    models = [Fused(rank, ranks) for rank in range(ranks)]
    for model in models:
        load(model, Fed(1, weights()).update)
    real = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]

    def one_wrong(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        real(targets, sources)
        for target in targets:
            if target.shape == (HIDDEN, INNER // ranks):
                target[0, 0] += 1

    monkeypatch.setattr(torch, "_foreach_copy_", one_wrong)
    fed = Fed(2, weights())
    replies = [load(model, Fed(2, weights()).update) for model in models]
    assert differing(merged(replies, fed.update.manifest.entries), fed.update.manifest) == {"model.layers.0.mlp.experts.down_proj"}


def test_what_arrived_damaged_is_told_from_what_was_loaded_wrongly():
    fed = Fed(1, weights())
    fed._tensors = weights() | {"model.norm.weight": weights()["model.norm.weight"] + 1}
    found = merged([load(Fused(), fed.update)], fed.update.manifest.entries)
    assert differing(found, fed.update.manifest) == {"model.norm.weight"}
    assert found["model.norm.weight"].endswith(", and so it arrived")


def test_a_shard_that_no_rank_loads_is_named(update: FileUpdate):
    twice = [load(Fused(0, 2), update), load(Fused(0, 2), update)]  # two first halves
    with pytest.raises(WeightMismatch, match=r"did not load 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        merged(twice, update.manifest.entries)


class Swapping(Fused):
    """Puts the second of two tensors where the first belongs as well."""

    def place(self, name: str, tensor: torch.Tensor) -> None:
        super().place(name.replace("experts.1.", "experts.0."), tensor)


class Leaving(Fused):
    def place(self, name: str, tensor: torch.Tensor) -> None:
        if "q_proj" not in name:
            super().place(name, tensor)


class Converting(Fused):
    def place(self, name: str, tensor: torch.Tensor) -> None:
        super().place(name, tensor * 2 if "q_proj" in name else tensor)


class Forgetting(Fused):
    def place(self, name: str, tensor: torch.Tensor) -> None:
        if "norm" not in name:
            super().place(name, tensor)


def test_an_expert_over_another_shows_in_the_checksum(update: FileUpdate):
    wrong = differing(loaded(Swapping(), update), update.manifest)
    assert wrong == {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Leaving, r"did not load 'model\.layers\.0\.self_attn\.q_proj\.weight'"),
        (Converting, r"did not load 'model\.layers\.0\.self_attn\.q_proj\.weight' as it came.*converts"),
        (Forgetting, r"nothing was loaded into 'norm'"),
        (lambda: Fused(dtype=torch.bfloat16), r"is published as float32, but the engine's parameter is bfloat16"),
    ],
)
def test_a_loader_that_leaves_out_or_converts_is_named(update: FileUpdate, model: Callable[[], Fused], message: str):
    with pytest.raises(WeightMismatch, match=message):
        loaded(model(), update)


def test_a_parameter_of_a_wider_type_holds_the_published_bits(tmp_path: Path):
    published = {name: tensor.bfloat16() for name, tensor in weights().items()}
    update = FileUpdate(publish(1, iter(published.items()), tmp_path))
    assert not differing(loaded(Fused(), update), update.manifest)


def test_copies_made_by_other_threads_are_seen_and_the_patch_ends(update: FileUpdate):
    class Threaded(Fused):
        def place(self, name: str, tensor: torch.Tensor) -> None:
            thread = threading.Thread(target=super().place, args=(name, tensor))
            thread.start()
            thread.join()

    original = torch.Tensor.copy_
    assert not differing(loaded(Threaded(), update), update.manifest)
    assert torch.Tensor.copy_ is original


def test_a_tied_head_is_read_from_the_embedding(tmp_path: Path):
    state = weights()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]

    class Tied(Fused):
        config = type("Config", (), {"tie_word_embeddings": True})

        def place(self, name: str, tensor: torch.Tensor) -> None:
            if name != "lm_head.weight":
                super().place(name, tensor)

    update = FileUpdate(publish(1, iter(state.items()), tmp_path))
    assert not differing(loaded(Tied(), update), update.manifest)
    with pytest.raises(WeightMismatch, match=r"lm_head\.weight"):
        loaded(type("Untied", (Tied,), {"config": None})(), update)


def test_parts_of_fused_experts():
    found = list(parts("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 3)))
    tensor = torch.arange(48).view(2, 8, 3)
    assert [name for name, _, _ in found] == [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(2) for p in ("gate", "up")]
    assert all(tensor[index].shape == shape == (4, 3) for _, index, shape in found)
    assert torch.equal(tensor[found[3][1]], tensor[1, 4:])
    assert list(parts("model.norm.weight", (3,))) == [("model.norm.weight", (), (3,))]


def test_a_version_is_compared_with_the_checkpoints_headers(tmp_path: Path, update: FileUpdate):
    from safetensors.torch import save_file

    state = {part: tensor[index].clone() for name, tensor in weights().items() for part, index, _ in parts(name, tuple(tensor.shape))}
    save_file(state, tmp_path / "model.safetensors")
    known = headers(tmp_path)
    assert known["model.layers.0.mlp.experts.3.down_proj.weight"] == ((HIDDEN, INNER), "float32")
    manifest = update.manifest
    check_fits(manifest, known, "float32", tied=False)
    check_fits(manifest, known, "bfloat16", tied=False)  # as the checkpoint keeps it
    fewer = dataclasses.replace(manifest, entries=manifest.entries[1:])
    with pytest.raises(WeightMismatch, match=r"lacks 'model\.embed_tokens\.weight'"):
        check_fits(fewer, known, "float32", tied=False)
    head = dataclasses.replace(manifest.entries[0], name="lm_head.weight")
    more = dataclasses.replace(manifest, entries=(*manifest.entries, head))
    check_fits(more, known, "float32", tied=True)
    with pytest.raises(WeightMismatch, match=r"has 'lm_head\.weight', which the engine's model does not have"):
        check_fits(more, known, "float32", tied=False)
    wide = dataclasses.replace(manifest.entries[0], dtype="float64")
    with pytest.raises(WeightMismatch, match=r"'model\.embed_tokens\.weight' is published as float64 \(10, 6\)"):
        check_fits(dataclasses.replace(manifest, entries=(wide, *manifest.entries[1:])), known, "float32", tied=False)
