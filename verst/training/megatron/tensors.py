"""A rank's parameters tied to the Hugging Face tensors they are made of, by the family's table: import from files, export in full.

Both directions go through the same list of entries, one for each Megatron tensor of the whole model. Export is a collective that
streams: one entry's tensors exist in full at a time, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from verst.errors import ModelError
from verst.training.megatron import groups
from verst.training.megatron.files import WeightFiles
from verst.training.megatron.table.rows import EMBEDDING, OUTPUT, Family, Row, shard, unshard
from verst.training.model import named

Key = tuple[str, int, int]
"""A Megatron tensor of the whole model: its row's name, layer and expert (−1 where it has none)."""


@dataclass(frozen=True, slots=True)
class Entry:
    row: Row
    layer: int
    expert: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def key(self) -> Key:
        return self.row.megatron, self.layer, self.expert

    @property
    def full_rows(self) -> int:
        """Size along dim 0 of the Megatron tensor before it is split."""
        return sum(shape[0] for shape in self.shapes)


class ModelTensors:
    """This rank's part of the model. The constructor is a collective over pipeline stages.

    Raises `ModelError` if the files, the table and the model do not have the same tensors.
    """

    def __init__(self, chunks: Sequence[Any], family: Family, hf_config: Any, files: WeightFiles) -> None:
        self._groups = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
        self._tied = hf_config.tie_word_embeddings
        self._files = files
        self._local_experts = family.experts(hf_config) // groups.expert().size()
        self.entries = list(entries_of(family, hf_config, files))
        self._by_key = {entry.key: entry for entry in self.entries}
        self._require_all_used(family, hf_config)
        self.local = _local(chunks, family, hf_config)
        lost = [files.missing_for(*key) for key in self.local if key not in self._by_key]
        if lost:
            raise ModelError(
                f"{files.where}: the weight files have no tensor for {named(lost)}; "
                "give the files that belong to this config.json, or the config.json that belongs to these files"
            )
        self._key_of = {id(tensor): key for key, tensor in self.local.items()}
        self._splits: dict[Key, tuple[int, int]] = {}
        self._views: dict[Key, list[torch.Tensor]] = {}
        self._stage = self._stages()

    # ---- import

    @torch.no_grad()
    def load(self) -> None:
        """Reads this rank's shards from the files. Raises `ModelError` where a tensor's shape is not the model's."""
        for entry in self.entries:
            target = self.local.get(entry.key)
            if target is None:
                continue
            parts = [self._files.read(name) for name in entry.names]
            ranks, rank = self._split(entry, target)
            own = shard(entry.row, parts, rank, ranks, self._groups)
            if own.shape != target.shape:
                raise ModelError(
                    f"{self._files.where}: {', '.join(entry.names)} of shapes {list(entry.shapes)} do not fit "
                    f"the model's {tuple(target.shape)}; give the files that belong to this config.json"
                )
            target.copy_(own)

    # ---- export

    @torch.no_grad()
    def full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and full tensors, on every rank. A collective."""
        for entry in self.entries:
            if not entry.row.is_expert:
                yield from zip(entry.names, self._from_stage(entry, self._own_full(entry)), strict=True)
            elif entry.expert < self._local_experts:  # one of each expert-parallel rank at a time
                yield from self._experts(entry)

    def _own_full(self, entry: Entry) -> list[torch.Tensor] | None:
        """The entry's full tensors, if this rank's stage has it: joined over tensor-parallel ranks."""
        tensor = self.local.get(entry.key)
        if tensor is None:
            return None
        views = self._views.get(entry.key)
        if views is not None and _same_memory(views[0], tensor):
            return views
        ranks, _ = self._split(entry, tensor)
        shards = _all_gather(tensor.detach(), _tensor_group(entry.row)) if ranks > 1 else [tensor.detach()]
        full = unshard(entry.row, shards, entry.shapes, self._groups)
        if all(_same_memory(part, tensor) for part in full):
            self._views[entry.key] = full  # making them anew for every version takes longer than sending them
        return full

    def _experts(self, first: Entry) -> Iterator[tuple[str, torch.Tensor]]:
        ranks = groups.expert().size()
        entries = [self._by_key[first.row.megatron, first.layer, first.expert + rank * self._local_experts] for rank in range(ranks)]
        own = self._own_full(entries[groups.expert().rank()])
        gathered: Sequence[Sequence[torch.Tensor] | None] = [None] * ranks
        if own is not None:
            group = groups.expert()
            gathered = list(zip(*(_all_gather(tensor, group) if ranks > 1 else [tensor] for tensor in own), strict=True))
        for entry, tensors in zip(entries, gathered, strict=True):
            yield from zip(entry.names, self._from_stage(entry, tensors), strict=True)

    def _from_stage(self, entry: Entry, tensors: Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
        """The tensors on every pipeline stage, from the one that has them."""
        group = groups.pipeline()
        if group.size() == 1:
            assert tensors is not None
            return tensors
        if tensors is None:
            like = next(iter(self.local.values()))
            dtype = torch.float32 if is_buffer(entry.row) else self._dtype
            tensors = [torch.empty(shape, dtype=dtype, device=like.device) for shape in entry.shapes]
        tensors = [tensor.contiguous() for tensor in tensors]
        for tensor in tensors:
            dist.broadcast(tensor, group=group, group_src=self._stage[entry.key])
        return tensors

    # ---- shards of this and of other layouts

    def place(self, parameter: torch.Tensor) -> tuple[Key, int, int]:
        """Which tensor of the whole model a parameter is, which tensor-parallel rank's part of it, and of how many."""
        key = self._key_of[id(parameter)]
        return key, *self.part(key)

    def part(self, key: Key) -> tuple[int, int]:
        """Which tensor-parallel rank's part of a tensor this rank has, and of how many."""
        ranks, rank = self._split(self._by_key[key], self.local[key])
        return rank, ranks

    def cut(self, key: Key, shards: Sequence[torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
        """The part of tensor-parallel rank `rank` of `ranks`, from the parts of all ranks of another layout. Raises `KeyError`."""
        entry = self._by_key[key]
        return shard(entry.row, unshard(entry.row, shards, entry.shapes, self._groups), rank, ranks, self._groups)

    # ---- inside

    @property
    def _dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.local.values() if isinstance(t, torch.nn.Parameter))

    def _split(self, entry: Entry, tensor: torch.Tensor) -> tuple[int, int]:
        """Tensor-parallel ranks that share this tensor, and which this is. TransformerEngine keeps some whole that others split."""
        if entry.key not in self._splits:  # asked for each tensor of each version
            group = _tensor_group(entry.row)
            whole = entry.row.split == "no" or (entry.row.split == "rows" and tensor.shape[0] == entry.full_rows)
            self._splits[entry.key] = (1, 0) if whole else (group.size(), group.rank())
        return self._splits[entry.key]

    def _stages(self) -> Mapping[Key, int]:
        """Which pipeline stage has which tensor."""
        group = groups.pipeline()
        held: list[Any] = [None] * group.size()
        if group.size() == 1:
            held = [list(self.local)]
        else:
            dist.all_gather_object(held, list(self.local), group=group)
        stages = {}
        for stage, keys in enumerate(held):
            stages |= {key: stage for key in keys if key not in stages}
        experts = {(row, layer): stage for (row, layer, expert), stage in stages.items() if expert >= 0}
        return stages | {e.key: experts[e.key[:2]] for e in self.entries if e.row.is_expert}

    def _require_all_used(self, family: Family, hf_config: Any) -> None:
        ignored = family.ignored(hf_config)
        used = {name for entry in self.entries for name in entry.names}
        foreign = [n for n in self._files.names if n not in used and not n.startswith(ignored) and not n.endswith("rotary_emb.inv_freq")]
        if self._tied:
            foreign = [name for name in foreign if name not in OUTPUT.hf]
        if foreign:
            raise ModelError(
                f"{self._files.where}: the table of family {family.name} has no row for {named(foreign)}; "
                "this model has parts that train.backend megatron does not know: train.backend fsdp trains it"
            )


def entries_of(family: Family, hf_config: Any, files: WeightFiles) -> Iterator[Entry]:
    """Every tensor of the whole model that the files have, in the table's order."""
    for row in family.rows_for(hf_config):
        for layer in _layers(row, family, hf_config):
            for expert in range(family.experts(hf_config)) if row.is_expert else (-1,):
                names = tuple(name.format(layer=layer, expert=expert) for name in row.hf)
                if all(name in files.names for name in names):
                    yield Entry(row, layer, expert, names, tuple(files.shape(name) for name in names))


def _layers(row: Row, family: Family, hf_config: Any) -> Sequence[int]:
    if not row.per_layer:
        return (-1,)
    kinds = {"all": (False, True), "dense": (False,), "moe": (True,)}[row.layers]
    return [layer for layer in range(hf_config.num_hidden_layers) if family.is_moe(hf_config, layer) in kinds]


def _local(chunks: Sequence[Any], family: Family, hf_config: Any) -> dict[Key, torch.Tensor]:
    """This rank's tensors by the key of the whole model. Raises `ModelError` for a parameter that no row names."""
    rows = {name: row for row in family.rows for name in (row.megatron, *row.aliases)}
    experts = family.experts(hf_config) // groups.expert().size()
    first_expert = experts * groups.expert().rank()
    found: dict[Key, torch.Tensor] = {}
    unknown = []
    for chunk in chunks:
        numbers = {i: layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        buffers = {name: tensor for name, tensor in chunk.named_buffers() if name.endswith("expert_bias")}
        for name, tensor in {**dict(chunk.named_parameters()), **buffers}.items():
            pattern, layer, expert = _pattern(name)
            row = rows.get(pattern)
            if row is None:
                unknown.append(name)
                continue
            own = EMBEDDING if row.megatron == OUTPUT.megatron and hf_config.tie_word_embeddings else row
            found[own.megatron, numbers.get(layer, -1), first_expert + expert if expert >= 0 else -1] = tensor
    if unknown:
        raise ModelError(f"the table of family {family.name} has no row for Megatron's {named(unknown)}")
    return found


def _pattern(name: str) -> tuple[str, int, int]:
    """A local parameter's name with its layer and expert taken out."""
    parts = name.split(".")
    layer = expert = -1
    for i, part in enumerate(parts[1:], 1):
        if parts[i - 1] == "layers":
            layer, parts[i] = int(part), "{layer}"
        elif parts[i - 1] == "local_experts":
            expert, parts[i] = int(part), "{expert}"
        elif "experts" in parts and "shared_experts" not in parts and part.startswith("weight") and part != "weight":
            expert, parts[i] = int(part.removeprefix("weight")), "weight{expert}"
    return ".".join(parts), layer, expert


def _same_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def is_buffer(row: Row) -> bool:
    """Whether it is the bias of expert choice, which is no parameter."""
    return row.megatron.endswith("expert_bias")


def _tensor_group(row: Row) -> dist.ProcessGroup:
    if row.is_expert:
        return groups.expert_tensor()
    return groups.tensor()


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
