"""What functions written for slime and Miles find of these packages: `args`, `Sample`, and the few modules that they import.

https://github.com/THUDM/slime/blob/main/docs/en/get_started/customization.md
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

from verst.errors import EnvironmentFailure, RewardFailure

GENERATED = "slime"
"""Under which a trajectory's `info` has what a generate function left in its sample: {metadata, attributes}."""

_FAMILY = ("slime", "miles")


@dataclass
class Sample:
    """A trajectory with the attributes that slime publishes, but for those of which Verst knows nothing."""

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    index: int | None = None  # of the member in its group
    prompt: Any = ""  # text, or messages: a list of {role, content}
    tokens: list[int] = field(default_factory=list)  # of the whole conversation
    response: str = ""  # text after the prompt; with several turns what the environment said too
    response_length: int = 0  # in tokens
    label: Any = None  # the prompt's field `label_key`, or else label or answer
    reward: Any = None
    loss_mask: list[int] | None = None  # [response_length] 1: sampled
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None  # [response_length]
    status: Sample.Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)  # the prompt's field `metadata_key` or metadata, or else all fields
    remove_sample: bool = False
    session_id: str | None = None
    multimodal_inputs: dict[str, Any] | None = None

    @property
    def effective_response_length(self) -> int:
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Sequence[int] = (),
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Adds to the response: tokens that the engine returned, with its log-probabilities, or others, which are not trained."""
        if trainable and tokens and (log_probs is None or len(log_probs) != len(tokens)):
            raise ValueError("trainable tokens need a log-probability each, which the engine returned")
        if not trainable and log_probs is not None:
            raise ValueError("tokens that are not trained have no log-probabilities")
        if self.loss_mask is None:
            self.loss_mask = [1] * self.response_length
        if self.rollout_log_probs is None:
            self.rollout_log_probs = [0.0] * self.response_length
        added = list(tokens)  # all in place: the function may hold these lists by names of its own
        self.tokens.extend(added)
        self.response += text or ""
        self.response_length += len(added)
        self.loss_mask.extend([int(trainable)] * len(added))
        self.rollout_log_probs.extend([0.0] * len(added) if log_probs is None else log_probs)
        if meta_info is not None and update_terminal_info:
            self.update_from_meta_info(args, meta_info)

    def update_from_meta_info(self, args: Any, meta_info: Mapping[str, Any]) -> None:
        """The status that an answer's `finish_reason` stands for."""
        reason = meta_info.get("finish_reason", {}).get("type")
        found = {"length": Sample.Status.TRUNCATED, "abort": Sample.Status.ABORTED, "stop": Sample.Status.COMPLETED}.get(reason)
        if found is not None:
            self.status = found


class Arguments(SimpleNamespace):
    """`args`: what the options of a run file say, and what the caller knows."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"args has no {name!r}: slime's arguments are not those of Verst; give it as {self.__dict__.get('_options')}.{name}"
        )


def make_arguments(options_name: str, values: Mapping[str, Any]) -> Arguments:
    """`options_name` is the run file's section that more of them may be given in."""
    return Arguments(_options=options_name, **values)


def make_importable() -> None:
    """From now on modules that import of slime or miles what is here can be imported in this process, with these packages or without.

    Of an installed one, its own is imported.
    """
    held: dict[str, Mapping[str, Any]] = {
        "utils.types": {"Sample": Sample},
        "utils.http_utils": {"post": post},
        "rollout.sglang_rollout": {"GenerateState": GenerateState, "get_model_url": get_model_url},
    }
    for name in _FAMILY:
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            continue
        sys.modules[name] = _module(name)
        for part, content in held.items():
            package, _, _ = part.partition(".")
            sys.modules.setdefault(f"{name}.{package}", _module(f"{name}.{package}"))
            module = sys.modules[f"{name}.{part}"] = _module(f"{name}.{part}")
            module.__dict__.update(content)


def sample_class() -> Any:
    """That of slime itself where the user's module has imported it, so that its statuses compare equal."""
    found = next((sys.modules[f"{name}.utils.types"] for name in _FAMILY if f"{name}.utils.types" in sys.modules), None)
    return getattr(found, "Sample", Sample)


def label_of(fields: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The prompt's field that `label_key` names, or else label or answer. Raises `RewardFailure` if there is no such field."""
    key = options.get("label_key")
    if key is None:
        return fields.get("label", fields.get("answer"))
    if key not in fields:
        raise RewardFailure(f"the prompt has no field {key!r} (label_key); its fields: {', '.join(fields) or 'none'}")
    return fields[key]


def metadata_of(fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt's field that `metadata_key` names, or metadata, or else all fields."""
    metadata = fields.get(options.get("metadata_key", "metadata"))
    return dict(metadata if isinstance(metadata, Mapping) else fields)


def _module(name: str) -> ModuleType:
    made = ModuleType(name, "In place of the package, which is not installed.")
    made.__path__ = []
    return made


# ---- what generate functions import


async def post(url: str, payload: Any, max_retries: int = 0, headers: Mapping[str, str] | None = None) -> Any:
    """slime's `post`, without its repetitions: what is refused once is refused for good. Raises `EnvironmentFailure` with the reason."""
    import httpx

    async with httpx.AsyncClient(timeout=None, trust_env=False) as client:  # the trajectory's deadline is the limit
        response = await client.post(url, json=payload, headers=dict(headers or {}))
    if response.is_error:
        raise EnvironmentFailure(f"{httpx.URL(url).path} was answered {response.status_code}: {response.text[:500]}")
    return response.json()


class GenerateState:
    """As much of slime's as generate functions use."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.tokenizer = load_tokenizer(args.hf_checkpoint)
        self.processor = None
        self.aborted = False


def get_model_url(args: Any, model_name: str, endpoint: str = "/generate") -> str:
    """There is one model, the policy."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"


@lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Any:
    """Of a directory. Raises `OSError` or `ValueError` if transformers finds none there."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)
