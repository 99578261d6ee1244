"""What a run will need: tokens and memory, from the run file and the model's own headers. No torch, no GPU."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verst.config.hub import model_directory
from verst.config.schema import Config
from verst.errors import ModelError

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model directory says of itself."""

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int | None  # longest sequence the model is made for; None: it does not say

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


def read_model(path: str | Path) -> ModelFacts:
    """Reads `config.json` and the headers of the safetensors files; no weights.

    Raises:
        ModelError: the directory or one of its parts is missing or malformed, or a hub id cannot be had.
    """
    root = model_directory(path)
    if not root.is_dir():
        raise ModelError(f"model.path: {root} is not a directory; give a Hugging Face model directory on this machine")
    about = read_config(root)
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"model.path: {root} has no *.safetensors weights; save the model with save_pretrained(..., safe_serialization=True)"
        )
    if not (root / "tokenizer.json").is_file() and not (root / "tokenizer_config.json").is_file():
        raise ModelError(f"model.path: {root} has no tokenizer (tokenizer.json); save the tokenizer beside the model with save_pretrained")
    text = about.get("text_config", about)  # multimodal configs keep the language model's part below this key
    try:
        heads = text["num_attention_heads"]
        return ModelFacts(
            parameters=sum(_count_parameters(file) for file in files),
            layers=text["num_hidden_layers"],
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocabulary=text["vocab_size"],
            max_positions=text.get("max_position_embeddings"),
        )
    except KeyError as missing:
        raise ModelError(f"{root / 'config.json'} has no {missing}: it is not the config of a causal language model") from missing


def read_config(directory: str | Path) -> dict[str, Any]:
    """A model's `config.json`. Raises `ModelError` if it is missing or malformed."""
    path = model_directory(directory) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model.path: {path.parent} has no config.json; it is not a Hugging Face model directory") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error


def _count_parameters(file: Path) -> int:
    """Elements of all tensors in a safetensors file, from its header (8 bytes of length, then JSON)."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ModelError(f"{file} is truncated: it has no safetensors header; copy or download it again")
        length = struct.unpack("<Q", prefix)[0]
        size = file.stat().st_size
        header = stream.read(length) if length <= size else b""
    try:
        entries = json.loads(header)
        end = max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} has no valid safetensors header; copy or download it again") from error
    if 8 + length + end > size:
        raise ModelError(f"{file} is truncated: {size} bytes of {8 + length + end}; copy or download it again")
    return sum(math.prod(e["shape"]) for k, e in entries.items() if k != "__metadata__")


def plan_lines(config: Config) -> list[str]:
    """The plan as lines for a person."""
    facts = read_model(config.model.path)
    return ["# plan", *_token_plan(config), *_memory_plan(config, facts)]


def _token_plan(config: Config) -> list[str]:
    rollout, train = config.rollout, config.train
    learns = config.algorithm.name == "grpo"
    trajectories = train.groups_per_step * (rollout.group_size if learns else 1)
    longest = config.max_trajectory_tokens
    most = trajectories * longest
    updates = train.minibatches * train.epochs
    capacity = config.capacity_groups
    ahead = config.worst_staleness
    return [
        f"step: {train.groups_per_step} groups, {trajectories} trajectories, at most {most:,} tokens, {updates} optimizer update(s)",
        f"trajectory: at most {longest:,} tokens "
        f"({config.data.max_prompt_tokens} prompt + {rollout.max_turns} turn(s) of {rollout.max_new_tokens})",
        f"staleness: {'none (synchronous)' if ahead == 0 else f'at most {ahead} version(s)'} with {capacity} slots",
        f"microbatches: {train.microbatch_tokens:,} tokens; full-length trajectories fit {train.microbatch_tokens // longest} at a time",
    ]


def _memory_plan(config: Config, facts: ModelFacts) -> list[str]:
    """Bytes by purpose. Activations depend on the model's code and are not estimated."""
    element = _BYTES[config.model.dtype]
    reference = config.algorithm.name == "grpo" and config.algorithm.kl_coefficient > 0
    # fp32 master weights, two AdamW moments and gradients; a bfloat16 model keeps its own copy of the weights beside the master's
    trainer = facts.parameters * (4 + 4 + 4 + 4 + (2 if element == 2 else 0) + (element if reference else 0)) / config.train.ranks
    weights = facts.parameters * element
    cache = config.rollout.max_running * config.max_trajectory_tokens * facts.kv_elements_per_token * element
    return [
        f"model: {facts.parameters:,} parameters, {config.model.dtype}, vocabulary {facts.vocabulary:,}",
        f"memory of a trainer rank: {_size(trainer)} (weights, optimizer, gradients{', reference' if reference else ''}) and activations",
        f"memory of each replica: {_size(weights)} weights + {_size(cache)} KV cache "
        f"({config.rollout.max_running} sequences x {config.max_trajectory_tokens:,} tokens)",
        *_shared_plan(config, trainer, weights, weights + cache),
        f"published weights: {_size(weights)} in shared memory, twice while a version replaces another",
    ]


def _shared_plan(config: Config, trainer: float, weights: int, replica: int) -> list[str]:
    """What lies on a GPU in each turn, if there is one for each rank and the replicas share them (`verst.runtime.placement`)."""
    ranks, transport = config.train.ranks, config.weights.transport
    if config.rollout.replicas % ranks or transport == "group":
        return []
    rolling = config.rollout.replicas // ranks * replica
    by_file = transport == "file" or (transport is None and ranks > 1)
    transfer = _size(rolling) if by_file else f"{_size(rolling + weights)} (the trainer's weights too)"
    return [
        f"if {config.rollout.replicas} replica(s) share the GPU(s) of {ranks} rank(s), a GPU holds {_size(trainer)} and activations while "
        f"training, {transfer} in a transfer, {_size(rolling)} while rolling; what the trainer gives up waits in host memory"
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError  # unreachable: GiB always returns
