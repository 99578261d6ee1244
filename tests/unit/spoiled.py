"""A directory in which everything is right, and how one thing in it is spoiled: what the table of bad input is made of."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import verst
from tests.loop.local import LocalRun, local_run
from verst import cli
from verst.config.load import load_config
from verst.config.schema import DataConfig, RewardConfig
from verst.data.sources import open_source
from verst.journal.lock import RunLock
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.rollout.boundary import GuardedEnvironment
from verst.rollout.environments import environment_factory
from verst.runtime.outlets import Outlets
from verst.runtime.rundir import RunDirectory
from verst.testing import tiny_model
from verst.types import Completion, FinishReason, Group, Message, Prompt, Status, Trajectory, Turn

RIGHT = """\
run: {name: new, dir: runs, steps: 1}
model: {path: model}
data: {path: prompts.jsonl, max_prompt_tokens: 64}
rollout: {max_new_tokens: 8}
"""
GOOD_LINE = b'{"prompt": "count", "answer": "1"}'


@dataclass
class World:
    """The current directory: a run file, prompts, a model; `runs/done` once it is asked for."""

    root: Path
    done: Callable[[], Path]
    patch: pytest.MonkeyPatch
    stack: contextlib.ExitStack

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def run(self) -> Path:
        """A copy of a finished run of four steps, with checkpoints of steps 2 and 4."""
        path = self.root / "runs" / "done"
        if not path.exists():
            shutil.copytree(self.done(), path)
        return path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def module(self, text: str) -> str:
        """A module of its own name, in the current directory."""
        name = f"mine_{abs(hash(self.root)):x}"
        self.write(f"{name}.py", text)
        self.patch.syspath_prepend(self.root)
        return name


Call = list[str] | Callable[[], Any]
"""A command line; or a call, which raises, or returns an exit code or what it was told."""
Spoil = Callable[[World], Call]


# ---- each returns how a row is met: what it spoils, and the command or call that meets it


def check(*overrides: str) -> Spoil:
    return lambda world: ["check", "run.yaml", *overrides]


def command(*words: str) -> Spoil:
    return lambda world: list(words)


def run_file(text: str | bytes, *overrides: str) -> Spoil:
    """`check` of another run file. Text that begins with + follows the right one, from line 5 on."""

    def met(world: World) -> Call:
        world.write("run.yaml", RIGHT + text[1:] if isinstance(text, str) and text.startswith("+") else text)
        return ["check", "run.yaml", *overrides]

    return met


def prompts(*lines: bytes, name: str = "prompts.jsonl", options: tuple[str, ...] = ()) -> Spoil:
    def met(world: World) -> Call:
        world.write(name, b"\n".join(lines))
        return ["check", "run.yaml", f"data.path={name}", *options]

    return met


def cut_parquet(world: World) -> Call:
    pq.write_table(pa.table({"prompt": ["x" * 100] * 50}), world.root / "cut.parquet")
    world.write("cut.parquet", (world.root / "cut.parquet").read_bytes()[:-20])
    return ["check", "run.yaml", "data.path=cut.parquet"]


def infinite_parquet(world: World) -> Call:
    pq.write_table(pa.table({"prompt": ["x"], "score": [float("inf")]}), world.root / "a.parquet")
    return ["check", "run.yaml", "data.path=a.parquet"]


def model(spoil: Callable[[Path], Any], *words: str) -> Spoil:
    """A command (default: check) after `spoil` was done to the model's directory."""

    def met(world: World) -> Call:
        spoil(world.model)
        return list(words) or ["check", "run.yaml"]

    return met


def loaded(spoil: Callable[[Path], Any], max_prompt_tokens: int = 64) -> Spoil:
    """A run in this process, up to where trainer and engine load the model."""

    def met(world: World) -> Call:
        spoil(world.model)
        return started(world, {"data": {"max_prompt_tokens": max_prompt_tokens}}, reward=length)

    return met


def taught(spoil: Callable[[Path], Any]) -> Spoil:
    """The same for supervised fine-tuning."""

    def met(world: World) -> Call:
        spoil(world.model)
        return started(world, {"algorithm": {"name": "sft"}, "data": {"columns": {"demonstration": "answer"}, "max_prompt_tokens": 64}})

    return met


def rolled(text: str) -> Spoil:
    """A run whose reward (`score`) or environment (`Talk`) is in this module, up to where it gives up."""

    def met(world: World) -> Call:
        module = world.module(text)
        if "class Talk" in text:
            rollout = {"group_size": 4, "max_new_tokens": 6, "environment": f"{module}:Talk"}
            return started(world, {"rollout": rollout}, reward=length)
        return started(world, {"reward": {"function": f"{module}:score"}})

    return met


def started(world: World, values: dict[str, Any], **extensions: Any) -> Call:
    rows = [{"prompt": f"count {i}", "answer": str(i)} for i in range(16)]
    return lambda: asyncio.run(local_run(world.root / "runs", world.model, values, prompts=rows, **extensions).go())


def length(trajectory: Any, fields: Any) -> float:
    return float(len(trajectory.completion))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        found = load_file(path / "model.safetensors")
        change(found)
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})

    return spoil


def config(**values: Any) -> Callable[[Path], None]:
    """Fields of the model's config.json; None removes one."""

    def spoil(path: Path) -> None:
        known = json.loads((path / "config.json").read_text()) | values
        (path / "config.json").write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return spoil


def shorter_vocabulary(path: Path) -> None:
    shutil.rmtree(path)
    tiny_model(path, vocab_size=100, eos_token_id=9, pad_token_id=None)


def never_ending(path: Path) -> None:
    (path / "chat_template.jinja").unlink()
    about = json.loads((path / "tokenizer_config.json").read_text())
    del about["eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(about))


def reward(text: str, name: str = "score", **options: Any) -> Spoil:
    """A reward of the user's, asked to score one trajectory. Says why that failed."""

    async def score(module: str) -> str | None:
        configured = RewardConfig(function=f"{module}:{name}", options=options)
        scorer = Scorer(RewardSpec.of(configured), workers=1, deadline_s=0.3)
        await scorer.start()
        try:
            return (await scorer.score(one_group())).trajectories[0].error
        finally:
            scorer.close()

    def met(world: World) -> Call:
        module = world.module(text)
        return lambda: asyncio.run(score(module))

    return met


def one_group() -> Group:
    tokens = np.zeros(3, np.int32)
    turn = Turn(0, 0, 3, FinishReason.STOP, "42")
    trajectory = Trajectory("7/0", tokens, np.ones(3, np.bool_), np.zeros(3, np.float32), tokens, (turn,), (), Status.FINISHED, 0)
    return Group(7, Prompt("rows:0", (Message("user", "?"),), {"answer": "42"}), (trajectory,), 0)


ENVIRONMENT = """
from verst.types import Reply
class Talk:
    async def start(self, prompt): {start}
    async def reply(self, completion): {reply}
"""


def environment(start: str = "return prompt.messages", reply: str = "return Reply()", name: str = "Talk", **options: Any) -> Spoil:
    """An environment of the user's, through one turn."""

    async def converse(module: str) -> None:
        make: Any = environment_factory(f"{module}:{name}", options)
        guarded = GuardedEnvironment(make, deadline_s=0.3)
        await guarded.start(Prompt("rows:0", (Message("user", "?"),)))
        await guarded.reply(Completion("42", (1,), FinishReason.STOP))

    def met(world: World) -> Call:
        module = world.module(ENVIRONMENT.format(start=start, reply=reply) if reply else "class Talk:\n    pass\n")
        return lambda: asyncio.run(converse(module))

    return met


def stored(spoil: Callable[[Path], Any], *words: str) -> Spoil:
    """A command after `spoil` was done to the directory of a finished run."""

    def met(world: World) -> Call:
        spoil(world.run)
        return list(words)

    return met


def resumed(spoil: Callable[[Path], Any]) -> Spoil:
    """The run itself in this process, which is what `resume` starts under Ray."""

    def met(world: World) -> Call:
        spoil(world.run)
        return lambda: asyncio.run(LocalRun(RunDirectory.open(world.run)[0]).go())

    return met


def nothing(path: Path) -> None:
    pass


def written(name: str, text: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).write_text(text)

    return spoil


def template(text: str) -> Callable[[Path], None]:
    return written("chat_template.jinja", text)


def half_an_export(run: Path) -> None:
    Path("out.partial").mkdir()


def another_model(run: Path) -> None:
    tiny_model("other", hidden_size=64)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda run: [path.unlink() for path in run.glob(name)]


def cut(name: str, nbytes: int = 10) -> Callable[[Path], Any]:
    """Takes the end off the files of this pattern."""
    return lambda run: [path.write_bytes(path.read_bytes()[:-nbytes]) for path in run.glob(name)]


def flip(name: str) -> Callable[[Path], None]:
    """Turns a bit in the middle of them."""

    def spoil(run: Path) -> None:
        for path in run.glob(name):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    return spoil


def held(world: World) -> Call:
    world.stack.enter_context(RunLock(world.run))
    return ["resume", "runs/done"]


def in_use(world: World) -> Call:
    listening = world.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = listening.getsockname()[1]
    given = load_config(world.root / "run.yaml", [f"tracking.prometheus_port={port}", "tracking.trackers=[]"])
    told: list[str] = []

    def opened() -> str:
        Outlets.open(RunDirectory(world.run), given, reported=0, tell=told.append).close()
        return told[0].replace(str(port), "PORT")

    return opened


def nobody_listens(*words: str) -> Spoil:
    """A command with {} in place of HOST:PORT, where nobody listens."""

    def met(world: World) -> Call:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        return [word.format(address) for word in words]

    return met


def full(name: str, *words: str) -> Spoil:
    """A command while the disk at `name` is full."""

    def met(world: World) -> Call:
        _ = world.run
        world.stack.enter_context(full_disk(world.root / name))
        return list(words)

    return met


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """A disk of two pages at `path`, with one of them taken. Who may not mount one gets a limit on the size of files in its place."""
    import resource

    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", path], capture_output=True, check=False).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted:
        (path / "taken").write_bytes(b"x" * 8000)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", path], check=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def unpermitted(name: str, mode: int, *words: str) -> Spoil:
    """A command of a user who may do with `name` what `mode` says, and no more."""

    def met(world: World) -> Call:
        path = world.run if name == "runs/done" else world.root / name
        path.mkdir(exist_ok=True) if name == "closed" else None
        path.chmod(mode)

        def run() -> int:
            try:
                with bound_by_permissions():
                    return cli.main(words)
            finally:
                path.chmod(0o755)

        return run

    return met


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Takes from this thread what lets root pass over permissions (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH), and gives it back."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 of them
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~0b110
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def unpicklable(world: World) -> Call:
    lock = threading.Lock()

    def guarded(trajectory: Any, fields: Any) -> float:
        with lock:
            return 1.0

    return lambda: verst.train("run.yaml", reward=guarded)


def one_shot(world: World) -> Call:
    return lambda: verst.train("run.yaml", overrides=["data.path=null"], prompts=iter([{"prompt": "a"}]))


def exhausted(world: World) -> Call:
    source = open_source(DataConfig(), iter(["a", "b"]))
    return lambda: [source.read_block(block) for block in (0, 1, 2, 0)]
