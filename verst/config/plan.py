"""What a run will need: tokens and memory, from the run file and the model's own headers. No torch, no GPU."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verst.config import scheduled
from verst.config.algorithms import DistillConfig, DpoConfig, PolicyGradientConfig, PpoConfig, PreferenceConfig, SftConfig
from verst.config.hub import model_directory
from verst.config.schema import Config
from verst.errors import ModelError
from verst.extend import origin

_BYTES = {"float32": 4, "bfloat16": 2}
_MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError, RuntimeError, ArithmeticError)
"""What transformers raises over configs, weights and tokenizers that are not what it expects."""
UNFIT = "give a model whose architecture this transformers knows, and whose files belong together"
"""What to do about a model that cannot be loaded."""
_POINTER = b"version "
"""How a Git LFS pointer begins. As a header's length it would be 2**61 bytes."""


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
    if not os.path.isdir(root):
        raise ModelError(f"model.path: {root} is not a directory; give a Hugging Face model directory on this machine")
    about = read_config(root)
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"model.path: {root} has no *.safetensors weights; save the model with save_pretrained(..., safe_serialization=True)"
        )
    if not (root / "tokenizer.json").is_file() and not (root / "tokenizer_config.json").is_file():
        raise ModelError(f"model.path: {root} has no tokenizer (tokenizer.json); save the tokenizer beside the model with save_pretrained")
    text = language_part(about)
    where = root / "config.json"
    heads = _count(text, "num_attention_heads", where)
    return ModelFacts(
        parameters=sum(map(_count_parameters, files)),
        layers=_count(text, "num_hidden_layers", where),
        kv_heads=_count(text, "num_key_value_heads", where, otherwise=heads),
        head_dim=_count(text, "head_dim", where, otherwise=0) or _count(text, "hidden_size", where) // heads,
        vocabulary=_count(text, "vocab_size", where),
        max_positions=_count(text, "max_position_embeddings", where, otherwise=0) or None,
    )


def _count(config: Any, name: str, where: Path, *, otherwise: int | None = None) -> int:
    """A number of a model's config, `otherwise` if the config does not say it."""
    value = config.get(name) if isinstance(config, dict) else None
    if value is None and otherwise is not None:
        return otherwise
    if type(value) is not int or value < 1:
        found = f"has no {name!r}" if value is None else f"has {name!r}: {value!r:.40}, which is no number above 0"
        raise ModelError(f"{where} {found}: it is not the config of a causal language model; give the directory of one in model.path")
    return value


@contextlib.contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """What libraries raise over a malformed model directory becomes a `ModelError`: `what`, the reason in one line, `remedy`."""
    try:
        yield
    except _MALFORMED as error:
        plain = isinstance(error, OSError | ValueError) and str(error)
        raise ModelError(f"{what}: {str(error).strip().splitlines()[0] if plain else origin(error)}; {remedy}") from error
    except Exception as error:
        if type(error) is Exception or type(error).__name__ == "SafetensorError":
            raise ModelError(f"{what}: {error}; {remedy}") from error  # tokenizers and safetensors are in Rust, and no more precise
        raise


def language_part(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a `config.json`: multimodal ones keep the language model's part below a key."""
    return about.get("text_config", about)


def read_config(directory: str | Path) -> dict[str, Any]:
    """A model's `config.json`. Raises `ModelError` if it is missing or malformed."""
    path = model_directory(directory) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.path: {path.parent} has no config.json; it is not a Hugging Face model directory: give the one that has it"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): give this user the right to read the model's files") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}; copy or download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object, as a model's config does; copy or download it again")
    return found


def _count_parameters(file: Path) -> int:
    """Elements of all tensors in a safetensors file, from its header (8 bytes of length, then JSON)."""
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix.ljust(8, b"\0"))[0]
            size = file.stat().st_size
            header = stream.read(length) if length <= size else b""
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): give this user the right to read the model's files") from error
    if len(prefix) < 8:
        raise ModelError(f"{file} is truncated: it has no safetensors header; copy or download it again")
    if prefix == _POINTER:
        raise ModelError(f"{file} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in that directory")
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        parameters = sum(math.prod(entry["shape"]) for entry in entries.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has no valid safetensors header; copy or download it again") from error
    if 8 + length + end > size:
        raise ModelError(f"{file} is truncated: {size} bytes of {8 + length + end}; copy or download it again")
    return parameters


def plan_lines(config: Config) -> list[str]:
    """The plan as lines for a person."""
    facts = read_model(config.model.path)
    return ["# plan", *_token_plan(config), *_memory_plan(config, facts)]


def _token_plan(config: Config) -> list[str]:
    rollout, train = config.rollout, config.train
    of_data = {SftConfig: 1, DpoConfig: 2}  # trajectories of each prompt
    trajectories = train.groups_per_step * of_data.get(type(config.algorithm), rollout.group_size)
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
        *scheduled.lines(config),
    ]


def _memory_plan(config: Config, facts: ModelFacts) -> list[str]:
    """Bytes by purpose. Activations depend on the model's code and are not estimated."""
    element = _BYTES[config.model.dtype]
    algorithm = config.algorithm
    penalised = isinstance(algorithm, PolicyGradientConfig) and algorithm.kl_coefficient > 0
    reference = penalised or isinstance(algorithm, PreferenceConfig)
    critic = _critic_parameters(config, facts)
    # fp32 master weights, two AdamW moments and gradients; a bfloat16 model keeps its own copy of the weights beside the master's
    trained = 4 + 4 + 4 + 4 + (2 if element == 2 else 0)
    trainer = (facts.parameters * (trained + (element if reference else 0)) + critic * trained) / config.train.ranks
    beside = f"{', reference' if reference else ''}{', critic' if critic else ''}"
    weights = facts.parameters * element
    teacher = _teacher_bytes(config, element)
    cache = config.rollout.max_running * config.max_trajectory_tokens * facts.kv_elements_per_token * element
    return [
        f"model: {facts.parameters:,} parameters, {config.model.dtype}, vocabulary {facts.vocabulary:,}",
        f"memory of a trainer rank: {_size(trainer)} (weights, optimizer, gradients{beside}) and activations",
        f"memory of each replica: {_size(weights)} weights + {_size(cache)} KV cache "
        f"({config.rollout.max_running} sequences x {config.max_trajectory_tokens:,} tokens)",
        *_teacher_plan(config, teacher),
        *_shared_plan(config, trainer, weights, weights + cache, teacher),
        f"published weights: {_size(weights)} in shared memory, twice while a version replaces another",
    ]


def _critic_parameters(config: Config, facts: ModelFacts) -> int:
    """0 without one. Its head is a few numbers, in place of the policy's large one, which may be tied: this is a bound."""
    algorithm = config.algorithm
    if not isinstance(algorithm, PpoConfig):
        return 0
    if algorithm.critic_path is None:
        return facts.parameters
    return sum(map(_count_parameters, Path(algorithm.critic_path).expanduser().glob("*.safetensors")))


def _teacher_bytes(config: Config, element: int) -> int:
    """Of the teacher beside each replica, with keys and values of one sequence; 0 without one."""
    if not isinstance(config.algorithm, DistillConfig):
        return 0
    facts = read_model(config.algorithm.teacher)
    return (facts.parameters + config.max_trajectory_tokens * facts.kv_elements_per_token) * element


def _teacher_plan(config: Config, teacher: int) -> list[str]:
    if not isinstance(config.algorithm, DistillConfig):
        return []
    return [f"memory of the teacher beside each replica: {_size(teacher)} ({config.algorithm.teacher})"]


def _shared_plan(config: Config, trainer: float, weights: int, replica: int, teacher: int) -> list[str]:
    """What lies on a GPU in each turn, if there is one for each rank and the replicas share them (`verst.runtime.placement`).

    Teachers lie there in every turn.
    """
    ranks, transport = config.train.ranks, config.weights.transport
    if config.rollout.replicas % ranks or transport == "group":
        return []
    replicas = config.rollout.replicas // ranks
    rolling, trainer = replicas * (replica + teacher), trainer + replicas * teacher
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
