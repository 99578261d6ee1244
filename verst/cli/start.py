"""Run files: init, schema."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from verst.cli.common import command, echo, print_json


def add(commands: Any) -> None:
    init = command(
        commands,
        "init",
        "write a commented run file for a task and a model",
        "verst init --task chain_sum --model models/smollm2                run.yaml, for a task of reasoning-gym",
        "verst init math.yaml --task math.jsonl --model models/smollm2     for prompts of your own, with a column `answer`",
        "verst init --task teach.jsonl --model M --algorithm sft           supervised fine-tuning on a column of demonstrations",
        "verst init --task openai/gsm8k:main --model Qwen/Qwen3-0.6B       data and model by their names on the hub",
        "verst init --task chain_sum --model M --engine sglang --backend megatron",
        detail="Lengths are read from the prompts, rates from the model's size. The file is checked before it is written, and nothing is\n"
        "written over.",
    )
    init.add_argument("path", metavar="FILE or DIR", nargs="?", type=Path, default=Path("run.yaml"), help="where (default: run.yaml)")
    task = "a reasoning-gym task, a .jsonl or .parquet file, or a data set: a directory, or org/name (org/name:config) of the hub"
    init.add_argument("--task", required=True, metavar="TASK", help=task)
    init.add_argument("--model", required=True, metavar="MODEL", help="a Hugging Face model directory, or org/name of the hub")
    init.add_argument("--algorithm", choices=("grpo", "sft"), default="grpo", help="how it learns (default: grpo)")
    schedule = "whether rollout waits for training (default: synchronous); see docs/staleness.md"
    init.add_argument("--schedule", choices=("synchronous", "one-step-off", "asynchronous"), default="synchronous", help=schedule)
    init.add_argument("--engine", choices=("hf", "sglang"), default="hf", help="what generates (default: hf)")
    init.add_argument("--backend", choices=("fsdp", "megatron"), default="fsdp", help="what trains (default: fsdp)")
    init.set_defaults(run=_init)
    schema = command(
        commands,
        "schema",
        "print the JSON schema of run files, for editors",
        "verst schema > verst.schema.json     then, as the first line of a run file: # yaml-language-server: $schema=verst.schema.json",
        "verst schema --markdown              the same for people: every option, as in docs/configuration.md",
    )
    schema.add_argument("--markdown", action="store_true", help="print a page in Markdown in place of the schema")
    schema.set_defaults(run=_schema)


def _init(options: argparse.Namespace) -> int:
    from verst.recipes.run_file import Asked, write_run_file

    asked = Asked(options.task, options.model, options.algorithm, options.engine, options.backend, options.schedule)
    path = write_run_file(options.path, asked)
    echo(f"wrote {path}; look at it, then: verst check {path} and verst train {path}")
    return 0


def _schema(options: argparse.Namespace) -> int:
    from verst.config.reference import json_schema, markdown

    if options.markdown:
        from verst.runtime.changes import CHANGEABLE

        print(markdown(CHANGEABLE), end="")
    else:
        print_json(json_schema())
    return 0
