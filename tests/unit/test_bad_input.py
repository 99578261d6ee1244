"""Bad input, as one table: what is wrong, how it is met, and what the message must say: the thing, its place, and the remedy.

A row begins with a directory in which everything is right, and spoils one thing in it. It is met by a command line, in this process, or
by a Python call. Nothing that was there may be lost by it: every file must be what it was, and a refused command makes none.
"""

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
from verst.errors import VerstError
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

pytestmark = pytest.mark.usefixtures("_one_thread")


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


@dataclass(frozen=True)
class Bad:
    """`thing`, `place`, `remedy`: what standard error, or the error that a call raises (or the text it returns), must have in it."""

    area: str
    what: str
    met: Spoil
    thing: str
    place: str
    remedy: str
    code: int = 1


# ---- how a row is met


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


def loaded(spoil: Callable[[Path], Any], **values: Any) -> Spoil:
    """A run in this process, up to where trainer and engine load the model."""

    def met(world: World) -> Call:
        spoil(world.model)
        rows = [{"prompt": f"count {i}", "answer": str(i)} for i in range(16)]
        given = {} if values.get("algorithm") else {"reward": length}
        return lambda: asyncio.run(local_run(world.root / "runs", world.model, values, prompts=rows, **given).go())

    return met


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
            await scorer.close()

    def met(world: World) -> Call:
        module = world.module(text)
        return lambda: asyncio.run(score(module))

    return met


def one_group() -> Group:
    tokens = pytest.importorskip("numpy").zeros(3, "int32")
    turn = Turn(0, 0, 3, FinishReason.STOP, "42")
    trajectory = Trajectory("7/0", tokens, tokens.astype(bool), tokens.astype("float32"), tokens, (turn,), (), Status.FINISHED, 0)
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
        guarded = GuardedEnvironment(environment_factory(f"{module}:{name}", options), deadline_s=0.3)
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


def another_model(run: Path) -> None:
    tiny_model("other", hidden_size=64)


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: [path.unlink() for path in run.glob(name)] and None


def cut(name: str, nbytes: int = 10) -> Callable[[Path], None]:
    """Takes the end off the files of this pattern."""
    return lambda run: [path.write_bytes(path.read_bytes()[:-nbytes]) for path in run.glob(name)] and None


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


NEW = ("train", "run.yaml")
DONE = "runs/done"
CHECKPOINT = "checkpoints/step-00000002"
EXPORT = ("export", DONE, "--out", "out", "--step", "2")
EVAL = ("eval", DONE, "--prompts", "1", "--samples", "1")
TASK = ("data.path=null", "data.task=chain_sum")

TABLE = [
    # the run file and overrides
    Bad(
        "config",
        "unknown option",
        run_file("+train:\n  learning_rate: 1\n"),
        "unknown option train.learning_rate",
        "run.yaml:6",
        "valid here: ",
    ),
    Bad("config", "option of another section", run_file("+lr: 1\n"), "unknown option lr", "run.yaml:5", "did you mean train.lr?"),
    Bad("config", "section that is no section", run_file("+train: 5\n"), "train:", "run.yaml:5", "expected a section"),
    Bad("config", "section without options", run_file("+train:\n"), "train:", "run.yaml:5", "leave it out"),
    Bad("config", "text for a number", run_file("+train:\n  lr: fast\n"), "train.lr", "run.yaml:6", "expected a number"),
    Bad("config", "fraction for a count", run_file("+train: {ranks: 1.5}\n"), "train.ranks", "run.yaml:5", "expected a whole number"),
    Bad(
        "config", "no for text", run_file("+reward:\n  function: no\n"), "reward.function", "run.yaml:6", "put quotes around it (got False)"
    ),
    Bad("config", "yes for a number", run_file("+train:\n  lr: yes\n"), "train.lr", "run.yaml:6", "expected a number, not true or false"),
    Bad(
        "config",
        "not one of the choices",
        run_file("+train: {backend: ddp}\n"),
        "train.backend",
        "run.yaml:5",
        "expected 'fsdp' or 'megatron'",
    ),
    Bad("config", "below the range", run_file("+train:\n  lr: 0\n"), "train.lr", "run.yaml:6", "must be above 0"),
    Bad("config", "NaN", run_file("+train: {clip_norm: .nan}\n"), "train.clip_norm", "run.yaml:5", "expected a finite number"),
    Bad("config", "infinity", run_file("+train: {clip_norm: 1e999}\n"), "train.clip_norm", "run.yaml:5", "expected a finite number"),
    Bad("config", "huge number", run_file(f"+train: {{ranks: {'9' * 30}}}\n"), "train.ranks", "run.yaml:5", "must be 2147483647 or less"),
    Bad(
        "config", "number of 5000 digits", run_file(f"+train:\n  ranks: {'9' * 5000}\n"), "99…' is no int", "run.yaml:6", "put it in quotes"
    ),
    Bad(
        "config", "date that is none", run_file("+reward: {options: {day: 2026-02-30}}\n"), "'2026-02-30' is no", "run.yaml:5", "in quotes"
    ),
    Bad("config", "list that is too short", run_file("+train: {betas: [0.9]}\n"), "train.betas", "run.yaml:5", "expected 2 values"),
    Bad("config", "missing section", run_file("run: {steps: 1}\n"), "model is required", "run.yaml", "with model.path"),
    Bad(
        "config",
        "missing option",
        run_file("run: {name: x}\nmodel: {path: m}\n"),
        "run.steps is required",
        "run.yaml:1",
        "set it in the run file",
    ),
    Bad(
        "config",
        "option set twice",
        run_file("+train:\n  lr: 0.1\n  lr: 0.2\n"),
        "train.lr is set twice",
        "run.yaml:7",
        "(first on line 6): remove",
    ),
    Bad("config", "bracket left open", run_file("+train: [\n"), "not valid YAML", "run.yaml:6", "check indentation, brackets and quotes"),
    Bad("config", "tab", run_file("+train:\n\tlr: 1\n"), r"found character '\t'", "run.yaml:6", "indent with spaces"),
    Bad("config", "colon within text", run_file("+data2: a: b\n"), "mapping values are not allowed", "run.yaml:5", "into quotes"),
    Bad("config", "key that is a number", run_file("+3: 4\n"), "the key '3' is read as int", "run.yaml:5", "put it in quotes"),
    Bad("config", "alias of itself", run_file("+reward: &a {options: *a}\n"), "reward.options", "run.yaml:5", "write the value out"),
    Bad("config", "no mapping", run_file("- a\n"), "found list", "run.yaml", "a run file is a mapping of sections such as 'run:'"),
    Bad("config", "empty file", run_file(""), "found NoneType", "run.yaml", "a run file is a mapping of sections such as 'run:'"),
    Bad(
        "config", "not UTF-8", run_file(RIGHT.encode() + b"# caf\xe9\n"), "is not UTF-8", "run.yaml: byte 145", "convert the file to UTF-8"
    ),
    Bad("config", "file missing", command("check", "none.yaml"), "no such run file", "none.yaml", "`verst init` writes one"),
    Bad("config", "a directory", command("check", "model"), "Is a directory", "model: cannot be read", "give a run file (YAML)"),
    Bad("config", "name too long", command("check", "x" * 300), "File name too long", "xxx: cannot be read", "give a run file (YAML)"),
    Bad(
        "config", "rule between options", run_file("+eval:\n  every_steps: 3\n"), "eval.every_steps", "run.yaml:6", "needs data.holdout > 0"
    ),
    Bad(
        "config",
        "option that does not apply",
        run_file("+train: {megatron: {x: 1}}\n"),
        "train.megatron does not",
        "run.yaml:5",
        "Remove it",
    ),
    Bad(
        "config", "run that leaves its directory", check("run.name=../up"), "run.name", "override 'run.name=../up'", "begins with a letter"
    ),
    Bad("config", "override without a value", check("train.lr"), "override 'train.lr'", "'train.lr'", "expected KEY=VALUE"),
    Bad(
        "config", "override that is no YAML", check("train.lr=["), "not valid YAML", "override 'train.lr=['", "check indentation, brackets"
    ),
    Bad(
        "config",
        "override of what is in no section",
        check("run.steps.x=3"),
        "steps is not a section",
        "override 'run.steps.x=3'",
        "leave out",
    ),
    Bad("config", "override out of range", check("train.lr=9"), "train.lr: must be", "override 'train.lr=9'", "must be 1 or less (got 9)"),
    Bad(
        "config",
        "override that is not UTF-8",
        check("run.name=\udcff"),
        "it is not UTF-8",
        r"override 'run.name=\udcff'",
        "write it in UTF-8",
    ),
    # data
    Bad(
        "data",
        "missing",
        check("data.path=none.jsonl"),
        "data.path none.jsonl",
        "the current directory is $ROOT",
        "give a .jsonl or .parquet file",
    ),
    Bad("data", "empty file", prompts(), "is empty: it has 0 bytes", "data.path prompts.jsonl", "give a file with at least one prompt"),
    Bad("data", "blank lines only", prompts(b"", b"  ", b""), "has no row", "prompts.jsonl", "give at least one prompt"),
    Bad("data", "a directory", check("data.path=model"), "is a directory", "data.path model", "give a .jsonl or .parquet file"),
    Bad("data", "compressed", prompts(b"x", name="a.jsonl.gz"), "ends in '.gz'", "data.path a.jsonl.gz", "give an uncompressed .jsonl"),
    Bad("data", "no JSON", prompts(b"", b"{nope}"), "not JSON", "prompts.jsonl, line 2", "Each line must hold one whole JSON object"),
    Bad("data", "JSON without end", prompts(b'{"prompt": ' + b"[" * 10**5), "not JSON", "prompts.jsonl, line 1", "one whole JSON object"),
    Bad(
        "data",
        "not UTF-8",
        prompts(b"", b'{"prompt": "\xff"}'),
        "byte 13 of the line is not UTF-8",
        "prompts.jsonl, line 2",
        "convert the file",
    ),
    Bad("data", "array", prompts(b"[1]"), "a JSON array", "prompts.jsonl, line 1", 'each line must hold one JSON object, as in {"prompt"'),
    Bad(
        "data",
        "infinite number",
        prompts(b'{"prompt": "a", "x": 1e999}'),
        "1e999 is beyond",
        "prompts.jsonl, line 1",
        "write a smaller one",
    ),
    Bad("data", "missing column", prompts(b'{"promt": "x"}'), "no column 'prompt'; nearest: promt", "prompts.jsonl, line 1", "Set data."),
    Bad(
        "data",
        "null prompt",
        prompts(b'{"prompt": null}'),
        "column 'prompt' is null",
        "prompts.jsonl, line 1",
        "it must be text or a list of",
    ),
    Bad(
        "data", "no message", prompts(b'{"prompt": []}'), "is an empty list", "prompts.jsonl, line 1", "it must be text or a list of {role"
    ),
    Bad(
        "data",
        "half a message",
        prompts(b'{"prompt": [{"role": "user"}]}'),
        "message 0",
        "prompts.jsonl, line 1",
        "must be {role, content}",
    ),
    Bad("data", "Parquet cut short", cut_parquet, "is not a readable Parquet file", "cut.parquet", "copy or write it again"),
    Bad("data", "infinity in Parquet", infinite_parquet, "column 'score' is inf", "a.parquet, row 0", "use a finite number or null"),
    Bad(
        "data",
        "all held out",
        prompts(GOOD_LINE, options=("data.holdout=0.9999999",)),
        "none of 2 rows",
        "prompts.jsonl",
        "change data.holdout",
    ),
    Bad(
        "data",
        "too few held out",
        prompts(GOOD_LINE, options=("data.holdout=0.1", "eval.every_steps=1")),
        "64 different held-out prompts wanted",
        "1 rows of prompts.jsonl",
        "lower eval.prompts",
    ),
    Bad("data", "no source", check("data.path=null"), "no source of prompts", "data.path, data.task", "set exactly one"),
    Bad("data", "unknown task", check(*TASK, "data.task=chain_summ"), "'chain_summ'", "data.task", "nearest: chain_sum"),
    Bad("data", "option the task has not", check(*TASK, "data.options={min_term: 2}"), "'min_term'", "data.options", "nearest: min_terms"),
    Bad(
        "data",
        "prompt too long",
        loaded(nothing, data={"max_prompt_tokens": 8}),
        "has 26 tokens",
        "prompt rows:",
        "raise data.max_prompt_tokens",
    ),
    Bad("data", "one-shot iterator", one_shot, "an iterator can be read only once", "prompts", "give a list, or the function that makes"),
    Bad("data", "one-shot iterator at its end", exhausted, "gave 2 rows", "rows is a one-shot iterator", "give a list"),
    # the model
    Bad("model", "missing", model(shutil.rmtree), "model.path", "model is not a directory", "give a Hugging Face model directory"),
    Bad("model", "no config.json", model(remove("config.json")), "no config.json", "model.path: model", "give the one that has it"),
    Bad("model", "config.json cut short", model(cut("config.json")), "not valid JSON", "model/config.json", "copy or download it again"),
    Bad("model", "config.json of something else", model(config(vocab_size=None)), "'vocab_size'", "model/config.json", "in model.path"),
    Bad(
        "model",
        "no attention heads",
        model(config(num_attention_heads=0)),
        "'num_attention_heads': 0",
        "model/config.json",
        "give the directory",
    ),
    Bad(
        "model",
        "no weights",
        model(remove("*.safetensors")),
        "no *.safetensors",
        "model.path: model",
        "save the model with save_pretrained",
    ),
    Bad("model", "weights cut short", model(cut("*.safetensors")), "is truncated", "model/model.safetensors", "copy or download it again"),
    Bad(
        "model",
        "Git LFS pointer",
        model(lambda path: (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")),
        "Git LFS pointer",
        "model/model.safetensors",
        "run `git lfs pull`",
    ),
    Bad("model", "no tokenizer", model(remove("tokenizer*")), "has no tokenizer", "model.path: model", "save the tokenizer beside"),
    Bad(
        "model",
        "context too short",
        model(config(max_position_embeddings=16)),
        "may have 72 tokens",
        "model is made for 16",
        "lower one of",
    ),
    Bad(
        "model",
        "missing tensor",
        loaded(tensors(lambda t: t.pop("model.norm.weight"))),
        "model.norm.weight",
        "$ROOT/model",
        "give the files",
    ),
    Bad(
        "model",
        "tensor of another shape",
        loaded(tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)}))),
        "model.norm.weight",
        "$ROOT/model",
        "give the files that belong to this config.json",
    ),
    Bad(
        "model",
        "tensor with NaN",
        loaded(tensors(lambda t: t["model.norm.weight"].fill_(torch.nan))),
        "tensors with NaN or infinity: model.norm.weight",
        "$ROOT/model",
        "copy or download the weights again",
    ),
    Bad("model", "unknown architecture", loaded(config(model_type="frob")), "model type `frob`", "$ROOT/model", "whose architecture this"),
    Bad(
        "model",
        "broken tokenizer",
        loaded(cut("tokenizer.json")),
        "no tokenizer that",
        "$ROOT/model",
        "copy or download its tokenizer files",
    ),
    Bad("model", "tokenizer of another model", loaded(shorter_vocabulary), "a vocab_size of 100", "$ROOT/model", "give the tokenizer that"),
    Bad(
        "model",
        "no end of sequence",
        loaded(never_ending, algorithm={"name": "sft"}, data={"demonstration_column": "answer", "max_prompt_tokens": 64}),
        "has an end-of-turn token",
        "$ROOT/model",
        "Set eos_token",
    ),
    Bad(
        "model",
        "chat template with an error",
        loaded(lambda path: (path / "chat_template.jinja").write_text("\n{% for m in %}")),
        "chat template of $ROOT/model",
        "line 2",
        "mend or replace it",
    ),
    Bad(
        "model",
        "chat template that fails",
        loaded(lambda path: (path / "chat_template.jinja").write_text("{{ 1 / 0 }}")),
        "chat template of $ROOT/model",
        "roles user: division by zero",
        "change the messages or the template",
    ),
    Bad(
        "model",
        "chat template that writes nothing",
        loaded(lambda path: (path / "chat_template.jinja").write_text("{# #}")),
        "has no tokens",
        "prompt rows:",
        "a chat template that writes it",
    ),
    # rewards
    Bad("reward", "not shipped", check("reward.function=exact_mach"), "reward 'exact_mach'", "nearest: exact_match", "write `module:name`"),
    Bad("reward", "module missing", check("reward.function=no_mod:f"), "no module 'no_mod'", "in $ROOT", "start Verst in its directory"),
    Bad("reward", "option that is refused", check("reward.options={feild: x}"), "feild", "shipped.py", "nearest: field"),
    Bad(
        "reward", "function missing", reward("def scor(t, f): return 1"), "has no 'score'; nearest: scor", "$ROOT/mine_", "define it there"
    ),
    Bad("reward", "wrong signature", reward("def score(t): return 1"), "reward score(t)", ".py:1", "Change its parameters"),
    Bad("reward", "options not taken", reward("def score(t, f): return 1", weight=2), "'weight'", ".py:1", "or the options that are given"),
    Bad("reward", "syntax error", reward("def score(t, f) return 1"), "SyntaxError", '.py", line 1', "mend the module"),
    Bad("reward", "import that fails", reward("import no_such"), "'no_such'", ".py:1", "install or mend what it imports"),
    Bad("reward", "not callable", reward("score = 3"), "is 3 of type int", ":score", "give a function or a class"),
    Bad(
        "reward",
        "raises",
        reward("def score(t, f): return f['x']"),
        "score raised KeyError: 'x'",
        ".py:1",
        "def score(t, f): return f['x']",
    ),
    Bad("reward", "returns None", reward("def score(t, f): pass"), "returned 'None' of type NoneType", ":score", "not a number"),
    Bad("reward", "returns NaN", reward("def score(t, f): return float('nan')"), "returned nan", ":score", "not a finite number"),
    Bad("reward", "returns text", reward("def score(t, f): return 'good'"), "returned 'good' of type str", ":score", "not a number"),
    Bad("reward", "hangs", reward("def score(t, f):\n while True: pass"), "exceeded 0.3 s", ":score", "reward.deadline_s"),
    Bad("reward", "ends its process", reward("def score(t, f): exit(3)"), "ended with exit code 3", ":score", "its process"),
    Bad(
        "reward",
        "cannot be sent",
        unpicklable,
        "reward unpicklable.<locals>.guarded",
        "verst.train",
        "Open connections, locks and files inside",
    ),
    # environments
    Bad(
        "environment",
        "not shipped",
        check("rollout.environment=single_tern"),
        "'single_tern'",
        "nearest: single_turn",
        "write `module:name`",
    ),
    Bad("environment", "class missing", environment(name="Tolk"), "has no 'Tolk'; nearest: Talk", "$ROOT/mine_", "define it there"),
    Bad("environment", "without methods", environment(reply=""), "has no method 'start'", ".py:1", "expected: async def start"),
    Bad("environment", "options not taken", environment(tries=2), "'tries'", ".py:3", "or the options that are given"),
    Bad("environment", "start raises", environment(start="raise KeyError(1)"), "start raised KeyError: 1", ".py:4", "raise KeyError(1)"),
    Bad("environment", "reply raises", environment(reply="return 1 / 0"), "reply in turn 1 raised", ".py:5", "return 1 / 0"),
    Bad(
        "environment",
        "wrong opening",
        environment(start="return 'hi'"),
        "returned 'hi' of type str",
        "Talk.start",
        "not a sequence of Message",
    ),
    Bad("environment", "wrong reply", environment(reply="return 'ok'"), "returned 'ok' of type str", "Talk.reply", "not a Reply"),
    Bad(
        "environment", "more turns than it has", check("rollout.max_turns=2"), "rollout.max_turns is 2", "single_turn", "remove it, or name"
    ),
    # runs: resume and what they keep
    Bad(
        "resume",
        "no such run",
        command("resume", "runs/none"),
        "nothing that exists, not a run",
        "$ROOT/runs/none",
        "made by `verst train`",
    ),
    Bad("resume", "no run", command("resume", "model"), "a directory without run.json, not a run", "$ROOT/model", "made by `verst train`"),
    Bad(
        "resume",
        "without config.yaml",
        stored(remove("config.yaml"), "resume", DONE),
        "is missing",
        "$ROOT/runs/done/config.yaml",
        "from a copy",
    ),
    Bad(
        "resume", "run.json cut short", stored(cut("run.json"), "resume", DONE), "cannot be read", "$ROOT/runs/done/run.json", "from a copy"
    ),
    Bad(
        "resume",
        "run.json of something else",
        stored(lambda run: (run / "run.json").write_text('{"format": 2}'), "resume", DONE),
        "has no run_id",
        "$ROOT/runs/done/run.json",
        "put it back from a copy",
    ),
    Bad(
        "resume",
        "option that must stay",
        stored(nothing, "resume", DONE, "train.lr=1"),
        "train.lr cannot be changed",
        "in a run",
        "what can be: ",
    ),
    Bad(
        "resume",
        "unknown option",
        stored(nothing, "resume", DONE, "train.rank=2"),
        "train.rank;",
        "override 'train.rank=2'",
        "train.ranks?",
    ),
    Bad(
        "resume", "fewer steps than it has", stored(nothing, "resume", DONE, "run.steps=3"), "run.steps 3", "committed 4", "give 4 or more"
    ),
    Bad(
        "resume", "a checkpoint", stored(nothing, "resume", f"{DONE}@2"), "done@2 is nothing", "$ROOT/runs/done@2", "made by `verst train`"
    ),
    Bad("resume", "in use", held, "is in use by process", "$ROOT/runs/done", "wait for it, stop it"),
    Bad("resume", "journal missing", resumed(remove("journal/*")), "holds no journal", "runs/done/journal", "put it back from a copy"),
    Bad(
        "resume",
        "journal corrupt",
        resumed(flip("journal/*")),
        "corrupt payload at byte",
        "journal/00000001.journal",
        "restore the file from a copy",
    ),
    Bad(
        "resume",
        "journal without its end",
        resumed(cut("journal/*", 5)),
        "incomplete frame",
        "journal/00000001.journal",
        "restore the file",
    ),
    Bad("checkpoint", "corrupt", stored(flip(f"{CHECKPOINT}/rank*"), *EXPORT), "is corrupt", CHECKPOINT, "of another step (4)"),
    Bad("checkpoint", "cut short", stored(cut(f"{CHECKPOINT}/rank*"), *EXPORT), "bytes instead of", CHECKPOINT, "Put it back from a copy"),
    Bad(
        "checkpoint",
        "shard missing",
        stored(remove(f"{CHECKPOINT}/rank*"), *EXPORT),
        "cannot be read",
        CHECKPOINT,
        "Put it back from a copy",
    ),
    Bad(
        "checkpoint",
        "no manifest",
        stored(remove(f"{CHECKPOINT}/man*"), *EXPORT),
        "no readable manifest",
        CHECKPOINT,
        "Put it back from a copy",
    ),
    Bad(
        "checkpoint",
        "damaged manifest",
        stored(flip(f"{CHECKPOINT}/man*"), *EXPORT),
        "damaged manifest",
        CHECKPOINT,
        "Put it back from a copy",
    ),
    Bad(
        "checkpoint",
        "step not stored",
        stored(nothing, *NEW, "--from", f"{DONE}@3"),
        "no checkpoint of step 3",
        DONE,
        "its checkpoints are of: 2, 4",
    ),
    Bad(
        "checkpoint",
        "step that is none",
        stored(nothing, *NEW, "--from", f"{DONE}@last"),
        "what follows @",
        f"{DONE}@last",
        f"as in {DONE}@40",
    ),
    Bad(
        "checkpoint",
        "of another model",
        stored(another_model, *NEW, "--from", DONE, "model.path=other"),
        "another model",
        "--from",
        "set model.path=",
    ),
    # other commands
    Bad(
        "train",
        "name that is taken",
        stored(nothing, *NEW, "run.name=done"),
        "exists already",
        "$ROOT/runs/done",
        "continue it with `verst resume",
    ),
    Bad(
        "export",
        "place that is taken",
        stored(nothing, "export", DONE, "--out", "model"),
        "exists already",
        "$ROOT/model",
        "give another --out",
    ),
    Bad(
        "export",
        "half an export there",
        stored(lambda run: Path("o.partial").mkdir(), "export", DONE, "--out", "o"),
        "exists",
        "o.partial",
        "--out",
    ),
    Bad("export", "step not stored", stored(nothing, *EXPORT[:-1], "3"), "no checkpoint of step 3", DONE, "its checkpoints are of: 2, 4"),
    Bad(
        "export", "step that is none", stored(nothing, *EXPORT[:-1], "x"), "--step", "invalid int value: 'x'", "usage: verst export", code=2
    ),
    Bad("inspect", "no run", command("inspect", "model"), "not a run", "$ROOT/model", "made by `verst train`"),
    Bad(
        "inspect",
        "group that is not there",
        stored(nothing, "inspect", DONE, "--group", "99"),
        "no group 99",
        "done/journal",
        "it has groups 0 to",
    ),
    Bad(
        "inspect",
        "id that is none",
        stored(nothing, "inspect", DONE, "--trajectory", "x"),
        "trajectory 'x'",
        "id",
        "GROUP/MEMBER, such as 12/3",
    ),
    Bad(
        "inspect", "range the wrong way", stored(nothing, "inspect", DONE, "--step", "9:1"), "'9:1' is empty", "--step", "lower end", code=2
    ),
    Bad("runs", "no directory", command("runs", "run.yaml"), "no directory", "run.yaml", "give the one that run.dir names"),
    Bad(
        "runs",
        "unknown metric",
        stored(nothing, "runs", "--compare", DONE, "--metric", "rewrd"),
        "'rewrd'",
        "none of these runs",
        "there are: ",
    ),
    Bad("watch", "no run", command("watch", "nowhere"), "not a run", "$ROOT/nowhere", "made by `verst train`"),
    Bad("eval", "nonsense", command("eval", "nowhere"), "neither a run nor", "nowhere", "no run.json and no config.json"),
    Bad("eval", "model without prompts", command("eval", "model"), "a model alone has no prompts", "model", "Give --set NAME=FILE"),
    Bad("eval", "no temperature", stored(nothing, *EVAL, "--temperature", "nan"), "nan", "--temperature", "give a number from 0"),
    Bad("eval", "output that exists", stored(nothing, *EVAL, "--out", "run.yaml"), "File exists", "--out run.yaml", "give a new file"),
    Bad(
        "profile",
        "step not journaled",
        stored(nothing, "profile", DONE, "--step", "9"),
        "no batch of step 9",
        "runs/done",
        "those of steps 1 to 4",
    ),
    Bad(
        "init",
        "file that exists",
        command("init", "--task", "prompts.jsonl", "--model", "model"),
        "exists already",
        "run.yaml",
        "such as run-2.yaml",
    ),
    Bad(
        "convert",
        "file missing",
        command("convert", "none.gguf", "out"),
        "no such file",
        "$ROOT/none.gguf",
        "give the path of a .gguf file",
    ),
    Bad(
        "usage",
        "unknown command",
        command("trian", "run.yaml"),
        "'trian'",
        "argument COMMAND",
        "choose from 'init', 'check', 'train'",
        code=2,
    ),
    Bad("usage", "unknown option", command(*NEW, "--epochs", "3"), "--epochs 3", "unrecognized arguments", "usage: verst", code=2),
    # disk, ports, permissions
    Bad("disk", "full: a new run", full("d", *NEW, "run.dir=d"), "cannot make", "$ROOT/d/new.partial", "set another run.dir"),
    Bad(
        "disk",
        "full: export",
        full("d", "export", DONE, "--out", "d/out"),
        "could not be copied",
        "$ROOT/d/out",
        "make room or rights there",
    ),
    Bad(
        "disk",
        "full: a checkpoint's export",
        full("d", *EXPORT[:3], "d/out", *EXPORT[4:]),
        "could not be exported",
        "$ROOT/d/out",
        "make room",
    ),
    Bad(
        "disk",
        "full: init",
        full("d", "init", "d/a.yaml", "--task", "prompts.jsonl", "--model", "model"),
        "cannot be written",
        "d/a.yaml",
        "make room",
    ),
    Bad(
        "disk",
        "run.dir below a file",
        command(*NEW, "run.dir=run.yaml/x"),
        "run.dir",
        "$ROOT/run.yaml/x/new.partial",
        "set another run.dir",
    ),
    Bad(
        "disk",
        "export below a file",
        stored(nothing, *EXPORT[:3], "run.yaml/x"),
        "could not be copied",
        "$ROOT/run.yaml/x",
        "another --out",
    ),
    Bad(
        "disk",
        "output in no directory",
        stored(nothing, *EVAL, "--out", "no/x.json"),
        "No such file",
        "--out no/x.json",
        "in a directory that",
    ),
    Bad(
        "ports",
        "Prometheus port taken",
        in_use,
        "127.0.0.1:PORT cannot be listened at",
        "Address already in use",
        "the run goes on without",
    ),
    Bad("ports", "no cluster there", nobody_listens(*NEW, "--address", "{}"), "no Ray cluster", "127.0.0.1:", "Is the head running"),
    Bad("ports", "address that is none", command(*NEW, "--address", "here"), "'here'", "address", "expected HOST:PORT"),
    Bad("permissions", "run file", unpermitted("run.yaml", 0, "check", "run.yaml"), "Permission denied", "run.yaml", "that you may read"),
    Bad(
        "permissions",
        "prompts",
        unpermitted("prompts.jsonl", 0, "check", "run.yaml"),
        "Permission denied",
        "data.path prompts.jsonl",
        "the right to",
    ),
    Bad(
        "permissions",
        "model",
        unpermitted("model/config.json", 0, "check", "run.yaml"),
        "Permission denied",
        "model/config.json",
        "the right to",
    ),
    Bad(
        "permissions",
        "model directory",
        unpermitted("model", 0, "check", "run.yaml"),
        "Permission denied",
        "model/config.json",
        "the right to",
    ),
    Bad(
        "permissions",
        "runs directory",
        unpermitted("closed", 0o555, *NEW, "run.dir=closed"),
        "Permission",
        "$ROOT/closed/new.partial",
        "rights there",
    ),
    Bad(
        "permissions",
        "a run",
        unpermitted("runs/done", 0, "inspect", DONE),
        "cannot be read (Permission denied)",
        "$ROOT/runs/done",
        "made by",
    ),
]


# ---- what holds for every row


@pytest.fixture
def world(tmp_path: Path, tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "model")
    with contextlib.ExitStack() as stack:
        made = World(tmp_path, lambda: request.getfixturevalue("done_run").run.root, monkeypatch, stack)
        made.write("run.yaml", RIGHT)
        made.write("prompts.jsonl", b"".join(b'{"prompt": "count %d", "answer": "%d"}\n' % (i, i) for i in range(40)))
        yield made


def outcome(call: Call, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and all that was said."""
    try:
        found = cli.main(call) if isinstance(call, list) else call()
    except SystemExit as ended:  # argparse
        found = ended.code
    except VerstError as error:
        return 1, str(error)
    said = capsys.readouterr().err
    return (found, said) if isinstance(found, int) else (1, f"{said}{found}")


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: f"{bad.area}: {bad.what}")
def test_bad_input(bad: Bad, world: World, capsys: pytest.CaptureFixture[str]):
    call = bad.met(world)
    capsys.readouterr()
    before = files(world.root)
    code, said = outcome(call, capsys)
    after = files(world.root)
    for part in (bad.thing, bad.place, bad.remedy):
        assert part.replace("$ROOT", str(world.root)) in said
    assert code == bad.code
    assert "Traceback" not in said
    lost = {name for name, content in before.items() if not after.get(name, b"").startswith(content)}  # logs of a run may grow
    assert not lost
    if isinstance(call, list):
        assert after == before


def test_the_table_is_as_wide_as_it_has_to_be():
    assert len(TABLE) == len({(bad.area, bad.what) for bad in TABLE}) >= 55
    assert all(bad.thing and bad.place and bad.remedy for bad in TABLE)
