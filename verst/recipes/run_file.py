"""`verst init`: a commented run file for a task and a model, which `verst check` accepts and `verst train` starts as it is.

What the file says is read from the two: lengths from the task's own prompts under the model's tokenizer, rates from the number of
parameters, the type of the weights from the model's config and the machine. It is checked as a run before it is written.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from verst.config.load import load_config
from verst.config.plan import ModelFacts, read_config, read_model
from verst.config.schema import DataConfig
from verst.data.chat import ChatRenderer, load_tokenizer
from verst.data.sources import Source, open_source
from verst.data.stream import distinct_prompts
from verst.errors import ConfigError, DataError
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import preflight
from verst.types import Prompt

Algorithm = Literal["grpo", "sft"]
Schedule = Literal["synchronous", "one-step-off", "asynchronous"]

_LOOKED_AT = 64  # prompts, to know lengths and columns
_HELD_OUT = 0.1
_ROUND = 32  # what lengths are multiples of
_PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "messages")
_ANSWER_COLUMNS = ("demonstration", "answer", "response", "completion", "solution", "output")
_FILES = (".jsonl", ".parquet")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_SMALL, _MEDIUM = 10_000_000, 1_000_000_000
_RATES = {"grpo": (1e-3, 1e-5, 1e-6), "sft": (5e-3, 5e-5, 1e-5)}
"""Learning rates that models below `_SMALL` and `_MEDIUM` parameters, and larger ones, can start with."""


_SCHEDULES: dict[Schedule, list[str]] = {
    "synchronous": ["  # capacity_groups: 32  # twice groups_per_step, with algorithm.old_logprobs=behaviour: one step ahead of training"],
    "one-step-off": ["  capacity_groups: 32  # twice groups_per_step: rollout runs one step ahead of training"],
    "asynchronous": [
        "  capacity_groups: 48  # three times groups_per_step: neither rollout nor training waits for the other",
        "  window_groups: 16  # late groups hold up no step until this many later ones have passed",
    ],
}
"""Of `rollout`, for batches of 16 groups; `docs/staleness.md` has the bounds."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the person said. `task` is one of reasoning-gym's, a .jsonl or .parquet file, or what the library datasets loads: a directory,
    or a name on the hub (`org/name`, `org/name:config`)."""

    task: str
    model: str
    algorithm: Algorithm = "grpo"
    engine: Literal["hf", "sglang"] = "hf"
    backend: Literal["fsdp", "megatron"] = "fsdp"
    schedule: Schedule = "synchronous"


@dataclass(frozen=True, slots=True)
class Read:
    """What task and model say."""

    data: dict[str, Any]  # the options of the section that name and shape the data
    facts: ModelFacts
    prompt_tokens: int  # of the longest prompt that was looked at
    answer_tokens: int  # of the longest known answer
    eval_prompts: int  # held-out prompts, 0 if there are too few
    answer_field: str | None


def write_run_file(path: Path, asked: Asked) -> Path:
    """Writes the file (`run.yaml` in it, if `path` is a directory or has no suffix) and returns where.

    Raises:
        ConfigError: there is a file already, or the columns of the data are not understood.
        VerstError: the model or the task is not there, or the two make no valid run; nothing is written then.
    """
    path = path if path.suffix in (".yaml", ".yml") else path / "run.yaml"
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already and is not written over: give another place, such as {path.with_stem(f'{path.stem}-2')}")
    text = run_file_text(asked)
    begun = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            begun = True
            file.write(text)
    except OSError as error:
        if begun:
            path.unlink(missing_ok=True)  # half a file would be in the way of the next attempt
        raise ConfigError(f"{path} cannot be written ({error.strerror}): make room or rights there, or give another place") from error
    return path


def run_file_text(asked: Asked) -> str:
    """The file's text, checked as a run. Raises as `write_run_file`."""
    if asked.algorithm == "sft" and asked.schedule != "synchronous":
        raise ConfigError(f"--schedule {asked.schedule}: sft samples nothing to run ahead with; leave it out")
    read = _read(asked)
    text = _text(asked, read)
    preflight(load_config(yaml.safe_load(text)), Extensions())
    return text


# ---- what task and model say


def _read(asked: Asked) -> Read:
    facts = read_model(asked.model)
    data = _data_options(asked)
    source = open_source(DataConfig(**data))
    prompts, _ = distinct_prompts(source, DataConfig(**data), _LOOKED_AT, share=1.0)
    if not prompts:
        raise DataError(f"{asked.task} has no prompt")
    renderer = ChatRenderer(load_tokenizer(asked.model))
    answer = next((name for name in _ANSWER_COLUMNS if name in prompts[0].fields), None)
    return Read(
        data,
        facts,
        max(len(renderer.opening(p.messages)) for p in prompts),
        max((_answer_tokens(p, answer, renderer) for p in prompts), default=0),
        _held_out(asked, source, data),
        answer,
    )


def _data_options(asked: Asked) -> dict[str, Any]:
    """`data.task`, or `data.path` or `data.dataset` with the columns that its first row has."""
    options: dict[str, Any]
    if asked.task.endswith(_FILES):
        options = {"path": asked.task}
    elif "/" in asked.task or Path(asked.task).is_dir():
        name, _, part = (asked.task, "", "") if Path(asked.task).is_dir() else asked.task.partition(":")
        options = {"dataset": name} | ({"options": {"name": part}} if part else {})
    else:
        return {"task": asked.task} | ({"columns": {"demonstration": "answer"}} if asked.algorithm == "sft" else {})
    source = open_source(DataConfig(**options))
    block = next((rows for i in range(source.num_blocks or 1) if (rows := source.read_block(i))), None)
    if not block:
        raise DataError(f"{asked.task} has no row: give at least one")
    there = list(block[0].load())
    prompt = _column(asked.task, "prompt", _PROMPT_COLUMNS, there)
    if prompt == "messages":
        return options  # whole conversations: prompt and demonstration in one
    columns = {"prompt": prompt}
    if asked.algorithm == "sft":
        columns["demonstration"] = _column(asked.task, "demonstration", _ANSWER_COLUMNS, there)
    columns = {name: column for name, column in columns.items() if name != column}
    return options | ({"columns": columns} if columns else {})


def _column(task: str, what: str, known: Sequence[str], columns: Sequence[str]) -> str:
    for name in known:
        if name in columns:
            return name
    raise ConfigError(f"{task}: which column is the {what}? There are {', '.join(columns)}; rename one to {what}")


def _answer_tokens(prompt: Prompt, column: str | None, renderer: ChatRenderer) -> int:
    text = "".join(m.content for m in prompt.demonstration) or (str(prompt.fields[column]) if column is not None else "")
    return len(renderer.tokenizer.encode(text, add_special_tokens=False)) + 2  # the end of the turn, and room for a space


def _held_out(asked: Asked, source: Source, data: dict[str, Any]) -> int:
    if asked.algorithm == "sft":
        return 0
    found, _ = distinct_prompts(source, DataConfig(**data, holdout=_HELD_OUT), _LOOKED_AT, share=_HELD_OUT)
    return len(found) if len(found) >= 8 else 0  # a handful would measure nothing


# ---- the file


def _text(asked: Asked, read: Read) -> str:
    sections: list[Callable[[Asked, Read], list[str]]] = [_run, _model, _data, _rollout, _reward, _train, _eval, _checkpoint]
    return "\n".join(_aligned(line) for section in sections for line in section(asked, read)) + "\n"


def _aligned(line: str) -> str:
    """A comment behind a value begins in a column of its own."""
    value, mark, comment = line.partition("  # ")
    return f"{value.rstrip():<34}# {comment.strip()}" if mark and value.strip() else line


def _run(asked: Asked, read: Read) -> list[str]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{Path(asked.task).stem}-{Path(asked.model).name}-{asked.algorithm}").strip("-.")
    what = "GRPO with rewards for right answers" if asked.algorithm == "grpo" else "supervised fine-tuning on demonstrations"
    return [
        f"# {asked.task}, learned by {asked.model}: {what}. Made by `verst init`; every value is a place to start.",
        "#   verst check FILE     what else can be set, and what this will need",
        "#   verst train FILE     any value can be replaced behind it: train.lr=1e-5",
        "run:",
        f"  name: {_scalar(name)}  # the directory below run.dir; a run is never written over",
        "  dir: runs",
        "  steps: 100",
        "  seed: 0",
    ]


def _model(asked: Asked, read: Read) -> list[str]:
    config = read_config(asked.model)
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = "bfloat16" if own == "bfloat16" and _NVIDIA_DRIVER.exists() else "float32"
    reason = "as its config says" if dtype == own else f"its config says {own}; bfloat16 is for GPUs"
    return [
        "model:",
        f"  path: {_scalar(asked.model)}",
        f"  dtype: {dtype}  # {reason}; optimizer and master weights are float32 either way",
    ]


def _data(asked: Asked, read: Read) -> list[str]:
    lines = ["data:", *(f"  {key}: {_scalar(value)}" for key, value in read.data.items())]
    if "task" in read.data:
        lines.append("  # options: {}  # of the task, by reasoning-gym's names")
    lines.append(f"  max_prompt_tokens: {_prompt_limit(read)}  # the longest of the first {_LOOKED_AT} prompts has {read.prompt_tokens}")
    if read.eval_prompts:
        lines.append(f"  holdout: {_HELD_OUT}  # this share of prompts, by hash of their text, is never trained on")
    return lines


def _rollout(asked: Asked, read: Read) -> list[str]:
    lines = ["rollout:"]
    if asked.algorithm == "grpo" or read.eval_prompts:
        lines.append(f"  engine: {asked.engine}")
    if asked.algorithm == "grpo":
        lines.append("  group_size: 8  # answers to each prompt; their mean reward is the baseline")
        lines += _SCHEDULES[asked.schedule]
    lines.append(
        f"  max_new_tokens: {_new_tokens(asked, read)}  # known answers have up to {read.answer_tokens}; a model that reasons needs more"
    )
    return lines


def _reward(asked: Asked, read: Read) -> list[str]:
    lines = ["algorithm:", f"  name: {asked.algorithm}"]
    if asked.algorithm == "sft":
        return lines
    if asked.schedule != "synchronous":
        lines.append("  old_logprobs: behaviour  # ratios to what the tokens were sampled by, whatever their version")
    if "task" in read.data:
        return [
            *lines,
            "reward:",
            "  function: reasoning_gym  # the task's own scorer, over the whole answer",
            "  # options: {tag: answer}  # over what stands in <answer>…</answer>, if the prompt asks for that",
        ]
    if read.answer_field is None:
        raise ConfigError(
            f"{asked.task}: no column to compare answers with ({', '.join(_ANSWER_COLUMNS)}): name one answer, or write a run file with "
            "reward.function: module:function of your own"
        )
    return [
        *lines,
        "reward:",
        "  function: exact_match  # or regex, math_verify, or module:function of your own",
        f"  options: {{field: {_scalar(read.answer_field)}}}",
    ]


def _train(asked: Asked, read: Read) -> list[str]:
    small, medium, large = _RATES[asked.algorithm]
    count = read.facts.parameters
    rate = small if count < _SMALL else medium if count < _MEDIUM else large
    limit = _prompt_limit(read) + _new_tokens(asked, read)
    lines = [
        "train:",
        f"  backend: {asked.backend}",
        "  groups_per_step: 16",
        f"  lr: {rate!r}  # for {count:,} parameters; halve it if the {'reward falls' if asked.algorithm == 'grpo' else 'loss rises'}",
        "  warmup_steps: 5",
    ]
    if limit > 16384:
        lines.append(f"  microbatch_tokens: {limit}  # one trajectory of the greatest length")
    return lines


def _eval(asked: Asked, read: Read) -> list[str]:
    if not read.eval_prompts:
        return []
    return ["eval:", "  every_steps: 10", f"  prompts: {read.eval_prompts}"]


def _checkpoint(asked: Asked, read: Read) -> list[str]:
    return ["checkpoint:", "  every_steps: 25", "  keep: 2"]


def _prompt_limit(read: Read) -> int:
    """Half as long again as the longest prompt seen, as far as the model reaches."""
    wanted = _rounded(1.5 * read.prompt_tokens)
    return wanted if read.facts.max_positions is None else max(read.prompt_tokens, min(wanted, read.facts.max_positions // 2))


def _new_tokens(asked: Asked, read: Read) -> int:
    answers = _rounded(2 * read.answer_tokens)
    wanted = answers if asked.algorithm == "sft" or read.facts.parameters < _SMALL else max(256, answers)
    return wanted if read.facts.max_positions is None else min(wanted, read.facts.max_positions - _prompt_limit(read))


def _rounded(tokens: float) -> int:
    return max(_ROUND, math.ceil(tokens / _ROUND) * _ROUND)


def _scalar(value: Any) -> str:
    """A value as YAML reads it back, text in quotes only where it needs them."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_scalar(item) if item.isidentifier() else json.dumps(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and yaml.safe_load(value) == value and ": " not in value and " #" not in value:
        return value
    return json.dumps(value, ensure_ascii=False)
