"""Bad input, as one table: what is wrong, how it is met, and what the message must say: the thing, its place, and the remedy.

A row begins with a directory in which everything is right, and spoils one thing in it. It is met by a command line, in this process, or
by a Python call. Nothing that was there may be lost by it: every file must be what it was, and a refused command makes none.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.unit.spoiled import (
    ENVIRONMENT,
    GOOD_LINE,
    RIGHT,
    Call,
    Spoil,
    World,
    another_model,
    check,
    command,
    config,
    cut,
    cut_parquet,
    environment,
    exhausted,
    flip,
    full,
    half_an_export,
    held,
    in_use,
    infinite_parquet,
    loaded,
    model,
    never_ending,
    nobody_listens,
    nothing,
    one_shot,
    prompts,
    remove,
    resumed,
    reward,
    rolled,
    run_file,
    shorter_vocabulary,
    stored,
    taught,
    template,
    tensors,
    unpermitted,
    unpicklable,
    written,
)
from verst import cli
from verst.errors import VerstError

pytestmark = pytest.mark.usefixtures("_one_thread")


@dataclass(frozen=True)
class Bad:
    """`thing`, `place`, `remedy`: what standard error, or the error that a call raises (or the text it returns), must have in it."""

    what: str
    met: Spoil
    thing: str
    place: str
    remedy: str
    code: int = 1


TO_NEW = ("train", "run.yaml")
DONE = "runs/done"
CHECKPOINT = "checkpoints/step-00000002"
TO_EXPORT = ("export", DONE, "--out", "out", "--step", "2")
TO_EVAL = ("eval", DONE, "--prompts", "1", "--samples", "1")
TO_INIT = ("--task", "prompts.jsonl", "--model", "model")
TASK = ("data.path=null", "data.task=chain_sum")

LFS = "version https://git-lfs.github.com/spec/v1\nsize 9\n"

CONFIG = [
    Bad("unknown option", run_file("+train:\n  learning_rate: 1\n"), "unknown option train.learning_rate", "run.yaml:6", "valid here: "),
    Bad("option of another section", run_file("+lr: 1\n"), "unknown option lr", "run.yaml:5", "did you mean train.lr?"),
    Bad("section that is no section", run_file("+train: 5\n"), "train:", "run.yaml:5", "expected a section"),
    Bad("section without options", run_file("+train:\n"), "train:", "run.yaml:5", "leave it out"),
    Bad("text for a number", run_file("+train:\n  lr: fast\n"), "train.lr", "run.yaml:6", "expected a number"),
    Bad("fraction for a count", run_file("+train: {ranks: 1.5}\n"), "train.ranks", "run.yaml:5", "expected a whole number"),
    Bad("no for text", run_file("+reward:\n  function: no\n"), "reward.function", "run.yaml:6", "put quotes around it (got False)"),
    Bad("yes for a number", run_file("+train:\n  lr: yes\n"), "train.lr", "run.yaml:6", "expected a number, not true or false"),
    Bad("not one of the choices", run_file("+train: {backend: ddp}\n"), "train.backend", "run.yaml:5", "expected 'fsdp' or 'megatron'"),
    Bad("below the range", run_file("+train:\n  lr: 0\n"), "train.lr", "run.yaml:6", "must be above 0"),
    Bad("NaN", run_file("+train: {clip_norm: .nan}\n"), "train.clip_norm", "run.yaml:5", "expected a finite number"),
    Bad("infinity", run_file("+train: {clip_norm: 1e999}\n"), "train.clip_norm", "run.yaml:5", "expected a finite number"),
    Bad("huge number", run_file(f"+train: {{ranks: {'9' * 30}}}\n"), "train.ranks", "run.yaml:5", "must be 2147483647 or less"),
    Bad("number of 5000 digits", run_file(f"+train:\n  ranks: {'9' * 5000}\n"), "99…' is no int", "run.yaml:6", "put it in quotes"),
    Bad("date that is none", run_file("+reward: {options: {day: 2026-02-30}}\n"), "'2026-02-30' is no", "run.yaml:5", "in quotes"),
    Bad("list that is too short", run_file("+train: {betas: [0.9]}\n"), "train.betas", "run.yaml:5", "expected 2 values"),
    Bad("missing section", run_file("run: {steps: 1}\n"), "model is required", "run.yaml", "with model.path"),
    Bad("missing option", run_file("run: {name: x}\nmodel: {path: m}\n"), "run.steps is required", "run.yaml:1", "set it in the run file"),
    Bad("option set twice", run_file("+train:\n  lr: 0.1\n  lr: 0.2\n"), "train.lr is set twice", "run.yaml:7", "line 6): remove one"),
    Bad("bracket left open", run_file("+train: [\n"), "not valid YAML", "run.yaml:6", "check indentation, brackets and quotes"),
    Bad("tab", run_file("+train:\n\tlr: 1\n"), r"found character '\t'", "run.yaml:6", "indent with spaces"),
    Bad("key that is no text", run_file('+"\\uDCFF": 1\n'), "cannot be written in UTF-8", "run.yaml:5", "write it without that escape"),
    Bad("colon within text", run_file("+data2: a: b\n"), "mapping values are not allowed", "run.yaml:5", "into quotes"),
    Bad("key that is a number", run_file("+3: 4\n"), "the key '3' is read as int", "run.yaml:5", "put it in quotes"),
    Bad("alias of itself", run_file("+reward: &a {options: *a}\n"), "reward.options", "run.yaml:5", "write the value out"),
    Bad("no mapping", run_file("- a\n"), "found list", "run.yaml", "a run file is a mapping of sections such as 'run:'"),
    Bad("empty file", run_file(""), "found NoneType", "run.yaml", "a run file is a mapping of sections such as 'run:'"),
    Bad("not UTF-8", run_file(RIGHT.encode() + b"# caf\xe9\n"), "is not UTF-8", "run.yaml: byte 145", "convert the file to UTF-8"),
    Bad("file missing", command("check", "none.yaml"), "no such run file", "none.yaml", "`verst init` writes one"),
    Bad("a directory", command("check", "model"), "Is a directory", "model: cannot be read", "give a run file (YAML)"),
    Bad("name too long", command("check", "x" * 300), "File name too long", "xxx: cannot be read", "give a run file (YAML)"),
    Bad("rule between options", run_file("+eval:\n  every_steps: 3\n"), "eval.every_steps", "run.yaml:6", "needs data.holdout > 0"),
    Bad("option that does not apply", run_file("+train: {megatron: {x: 1}}\n"), "train.megatron does not", "run.yaml:5", "Remove it"),
    Bad("run that leaves its directory", check("run.name=../up"), "run.name", "override 'run.name=../up'", "begins with a letter"),
    Bad("override without a value", check("train.lr"), "override 'train.lr'", "'train.lr'", "expected KEY=VALUE"),
    Bad("override that is no YAML", check("train.lr=["), "not valid YAML", "override 'train.lr=['", "check indentation, brackets"),
    Bad("override of what is in no section", check("run.steps.x=3"), "steps is not a section", "override 'run.steps.x=3'", "leave out"),
    Bad("override out of range", check("train.lr=9"), "train.lr: must be", "override 'train.lr=9'", "must be 1 or less (got 9)"),
    Bad("override that is not UTF-8", check("run.name=\udcff"), "it is not UTF-8", r"override 'run.name=\udcff'", "write it in UTF-8"),
]
DATA = [
    Bad("missing", check("data.path=none.jsonl"), "data.path none.jsonl", "current directory is $ROOT", "give a .jsonl or"),
    Bad("empty file", prompts(), "is empty: it has 0 bytes", "data.path prompts.jsonl", "give a file with at least one prompt"),
    Bad("blank lines only", prompts(b"", b"  ", b""), "has no row", "prompts.jsonl", "give at least one prompt"),
    Bad("a directory", check("data.path=model"), "is a directory", "data.path model", "give a .jsonl or .parquet file"),
    Bad("compressed", prompts(b"x", name="a.jsonl.gz"), "ends in '.gz'", "data.path a.jsonl.gz", "give an uncompressed .jsonl"),
    Bad("no JSON", prompts(b"", b"{nope}"), "not JSON", "prompts.jsonl, line 2", "Each line must hold one whole JSON object"),
    Bad("JSON without end", prompts(b'{"prompt": ' + b"[" * 10**5), "not JSON", "prompts.jsonl, line 1", "one whole JSON object"),
    Bad("not UTF-8", prompts(b"", b'{"prompt": "\xff"}'), "byte 13 of the line is not UTF-8", "prompts.jsonl, line 2", "convert the file"),
    Bad("array", prompts(b"[1]"), "a JSON array", "prompts.jsonl, line 1", 'each line must hold one JSON object, as in {"prompt"'),
    Bad("infinite number", prompts(b'{"prompt": "a", "x": 1e999}'), "1e999 is beyond", "prompts.jsonl, line 1", "write a smaller one"),
    Bad("missing column", prompts(b'{"promt": "x"}'), "no column 'prompt'; nearest: promt", "prompts.jsonl, line 1", "Set data."),
    Bad("null prompt", prompts(b'{"prompt": null}'), "column 'prompt' is null", "prompts.jsonl, line 1", "it must be text or a list of"),
    Bad("no message", prompts(b'{"prompt": []}'), "is an empty list", "prompts.jsonl, line 1", "it must be text or a list of {role"),
    Bad("half a message", prompts(b'{"prompt": [{"role": "user"}]}'), "message 0", "prompts.jsonl, line 1", "must be {role, content}"),
    Bad("Parquet cut short", cut_parquet, "is not a readable Parquet file", "cut.parquet", "copy or write it again"),
    Bad("infinity in Parquet", infinite_parquet, "column 'score' is inf", "a.parquet, row 0", "use a finite number or null"),
    Bad("all held out", prompts(GOOD_LINE, options=("data.holdout=0.9999999",)), "none of 2 rows", "prompts.jsonl", "change data.holdout"),
    Bad(
        "too few held out",
        prompts(GOOD_LINE, options=("data.holdout=0.1", "eval.every_steps=1")),
        "64 different held-out prompts wanted",
        "1 rows of prompts.jsonl",
        "lower eval.prompts",
    ),
    Bad("no source", check("data.path=null"), "no source of prompts", "data.path", "set exactly one of"),
    Bad("unknown task", check(*TASK, "data.task=chain_summ"), "'chain_summ'", "data.task", "nearest: chain_sum"),
    Bad("option the task has not", check(*TASK, "data.options={min_term: 2}"), "'min_term'", "data.options", "nearest: min_terms"),
    Bad("prompt too long", loaded(nothing, max_prompt_tokens=8), "has 26 tokens", "prompt rows:", "raise data.max_prompt_tokens"),
    Bad("one-shot iterator", one_shot, "an iterator can be read only once", "prompts", "give a list, or the function that makes"),
    Bad("one-shot iterator at its end", exhausted, "gave 2 rows", "rows is a one-shot iterator", "give a list"),
]
MODEL = [
    Bad("missing", model(shutil.rmtree), "model.path", "model is not a directory", "give a Hugging Face model directory"),
    Bad("no config.json", model(remove("config.json")), "no config.json", "model.path: model", "give the one that has it"),
    Bad("config.json cut short", model(cut("config.json")), "not valid JSON", "model/config.json", "copy or download it again"),
    Bad("config.json of something else", model(config(vocab_size=None)), "'vocab_size'", "model/config.json", "in model.path"),
    Bad("no attention heads", model(config(num_attention_heads=0)), "'num_attention_heads': 0", "model/config.json", "give the directory"),
    Bad("no weights", model(remove("*.safetensors")), "no *.safetensors", "model.path: model", "save the model with save_pretrained"),
    Bad("weights cut short", model(cut("*.safetensors")), "is truncated", "model/model.safetensors", "copy or download it again"),
    Bad("Git LFS pointer", model(written("model.safetensors", LFS)), "Git LFS pointer", "model/model.safetensors", "run `git lfs pull`"),
    Bad("no tokenizer", model(remove("tokenizer*")), "has no tokenizer", "model.path: model", "save the tokenizer beside"),
    Bad("context too short", model(config(max_position_embeddings=16)), "may have 72 tokens", "model is made for 16", "lower one of"),
    Bad("missing tensor", loaded(tensors(lambda t: t.pop("model.norm.weight"))), "model.norm.weight", "$ROOT/model", "give the files"),
    Bad(
        "tensor of another shape",
        loaded(tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)}))),
        "model.norm.weight",
        "$ROOT/model",
        "give the files",
    ),
    Bad(
        "tensor with NaN",
        loaded(tensors(lambda t: t["model.norm.weight"].fill_(torch.nan))),
        "infinity: model.norm.weight",
        "$ROOT/model",
        "download",
    ),
    Bad("unknown architecture", loaded(config(model_type="frob")), "model type `frob`", "$ROOT/model", "whose architecture this"),
    Bad("broken tokenizer", loaded(cut("tokenizer.json")), "no tokenizer that", "$ROOT/model", "copy or download its tokenizer files"),
    Bad("tokenizer of another model", loaded(shorter_vocabulary), "a vocab_size of 100", "$ROOT/model", "give the tokenizer that"),
    Bad("no end of sequence", taught(never_ending), "has an end-of-turn token", "tokenizer", "Set eos_token in tokenizer_config.json"),
    Bad(
        "chat template with an error", loaded(template("\n{% for m in %}")), "chat template of $ROOT/model", "line 2", "mend or replace it"
    ),
    Bad(
        "chat template that fails",
        loaded(template("{{ 1 / 0 }}")),
        "roles user: division by zero",
        "chat template of $ROOT/model",
        "change the messages or",
    ),
    Bad("chat template that writes nothing", loaded(template("{# #}")), "has no tokens", "prompt rows:", "a chat template that writes it"),
]
REWARD = [
    Bad("not shipped", check("reward.function=exact_mach"), "reward 'exact_mach'", "nearest: exact_match", "write `module:name`"),
    Bad("module missing", check("reward.function=no_mod:f"), "no module 'no_mod'", "in $ROOT", "start Verst in its directory"),
    Bad("option that is refused", check("reward.options={feild: x}"), "feild", "shipped.py", "nearest: field"),
    Bad("function missing", reward("def scor(t, f): return 1"), "has no 'score'; nearest: scor", "$ROOT/mine_", "define it there"),
    Bad("wrong signature", reward("def score(t): return 1"), "reward score(t)", ".py:1", "Change its parameters"),
    Bad("options not taken", reward("def score(t, f): return 1", weight=2), "'weight'", ".py:1", "or the options that are given"),
    Bad("syntax error", reward("def score(t, f) return 1"), "SyntaxError", '.py", line 1', "mend the module"),
    Bad("import that fails", reward("import no_such"), "'no_such'", ".py:1", "install or mend what it imports"),
    Bad("not callable", reward("score = 3"), "is 3 of type int", ":score", "give a function or a class"),
    Bad("always raises", rolled("def score(t, f): return f['x']"), "score raised KeyError: 'x'", ".py:1", "verst resume $ROOT/runs/run"),
    Bad("returns None", reward("def score(t, f): pass"), "returned None of type NoneType", ":score", "not a number: return one"),
    Bad("returns NaN", reward("def score(t, f): return float('nan')"), "returned nan", ":score", "not a finite number: return one"),
    Bad("returns text", reward("def score(t, f): return 'good'"), "returned 'good' of type str", ":score", "not a number: return one"),
    Bad("hangs", reward("def score(t, f):\n while True: pass"), "exceeded 0.3 s", ":score", "or raise reward.deadline_s"),
    Bad("ends its process", reward("def score(t, f): exit(3)"), "ended with exit code 3", ":score", "what it printed is in"),
    Bad("cannot be sent", unpicklable, "reward unpicklable.<locals>.guarded", "verst.train", "Open connections, locks and files inside"),
]
ENVIRONMENT = [
    Bad("not shipped", check("rollout.environment=single_tern"), "'single_tern'", "nearest: single_turn", "write `module:name`"),
    Bad("class missing", environment(name="Tolk"), "has no 'Tolk'; nearest: Talk", "$ROOT/mine_", "define it there"),
    Bad("without methods", environment(reply=""), "has no method 'start'", ".py:1", "expected: async def start"),
    Bad("options not taken", environment(tries=2), "'tries'", ".py:3", "or the options that are given"),
    Bad("always raises", rolled(ENVIRONMENT.format(start="1 / 0", reply="pass")), "start raised", ".py:4", "verst resume $ROOT/runs/run"),
    Bad("reply raises", environment(reply="return 1 / 0"), "reply in turn 1 raised", ".py:5", "return 1 / 0"),
    Bad(
        "wrong opening",
        environment(start="return 'hi'"),
        "returned 'hi' of type str",
        "Talk.start",
        "not a sequence of Message: return one",
    ),
    Bad("wrong reply", environment(reply="return 'ok'"), "returned 'ok' of type str", "Talk.reply", "not a Reply: return one"),
    Bad("more turns than it has", check("rollout.max_turns=2"), "rollout.max_turns is 2", "single_turn", "remove it, or name"),
]
RESUME = [
    Bad("no such run", command("resume", "runs/none"), "nothing that exists, not a run", "$ROOT/runs/none", "made by `verst train`"),
    Bad("no run", command("resume", "model"), "a directory without run.json, not a run", "$ROOT/model", "made by `verst train`"),
    Bad("without config.yaml", stored(remove("config.yaml"), "resume", DONE), "is missing", "$ROOT/runs/done/config.yaml", "from a copy"),
    Bad("run.json cut short", stored(cut("run.json"), "resume", DONE), "cannot be read", "$ROOT/runs/done/run.json", "from a copy"),
    Bad(
        "run.json of something else",
        stored(written("run.json", '{"format": 2}'), "resume", DONE),
        "has no run_id",
        "$ROOT/runs/done/run.json",
        "from a copy",
    ),
    Bad("option that must stay", stored(nothing, "resume", DONE, "train.lr=1"), "train.lr cannot be changed", "in a run", "what can be: "),
    Bad("unknown option", stored(nothing, "resume", DONE, "train.rank=2"), "train.rank;", "override 'train.rank=2'", "train.ranks?"),
    Bad("fewer steps than it has", stored(nothing, "resume", DONE, "run.steps=3"), "run.steps 3", "committed 4", "give 4 or more"),
    Bad("a checkpoint", stored(nothing, "resume", f"{DONE}@2"), "done@2 is nothing", "$ROOT/runs/done@2", "`verst train --from`"),
    Bad("in use", held, "is in use by process", "$ROOT/runs/done", "wait for it, stop it"),
    Bad("journal missing", resumed(remove("journal/*")), "holds no journal", "runs/done/journal", "put it back from a copy"),
    Bad("journal corrupt", resumed(flip("journal/*")), "corrupt payload at byte", "journal/00000001.journal", "restore the file"),
    Bad("journal without its end", resumed(cut("journal/*", 165)), "incomplete frame", "journal/00000001.journal", "restore the file"),
]
CHECKPOINT = [
    Bad("corrupt", stored(flip(f"{CHECKPOINT}/rank*"), *TO_EXPORT), "is corrupt", CHECKPOINT, "of another step (4)"),
    Bad("cut short", stored(cut(f"{CHECKPOINT}/rank*"), *TO_EXPORT), "bytes instead of", CHECKPOINT, "Put it back from a copy"),
    Bad("shard missing", stored(remove(f"{CHECKPOINT}/rank*"), *TO_EXPORT), "cannot be read", CHECKPOINT, "Put it back from a copy"),
    Bad("no manifest", stored(remove(f"{CHECKPOINT}/man*"), *TO_EXPORT), "no readable manifest", CHECKPOINT, "Put it back from a copy"),
    Bad("damaged manifest", stored(flip(f"{CHECKPOINT}/man*"), *TO_EXPORT), "damaged manifest", CHECKPOINT, "Put it back from a copy"),
    Bad(
        "step not stored", stored(nothing, *TO_NEW, "--from", f"{DONE}@3"), "no checkpoint of step 3", DONE, "its checkpoints are of: 2, 4"
    ),
    Bad("step that is none", stored(nothing, *TO_NEW, "--from", f"{DONE}@last"), "what follows @", f"{DONE}@last", f"as in {DONE}@40"),
    Bad(
        "of another model", stored(another_model, *TO_NEW, "--from", DONE, "model.path=other"), "another model", "--from", "set model.path="
    ),
]
TRAIN = [
    Bad("name that is taken", stored(nothing, *TO_NEW, "run.name=done"), "exists already", "$ROOT/runs/done", "continue it with"),
]
EXPORT = [
    Bad("place that is taken", stored(nothing, "export", DONE, "--out", "model"), "exists already", "$ROOT/model", "give another --out"),
    Bad("half an export there", stored(half_an_export, *TO_EXPORT), "exists already", "$ROOT/out.partial", "give another --out"),
    Bad("step not stored", stored(nothing, *TO_EXPORT[:-1], "3"), "no checkpoint of step 3", DONE, "its checkpoints are of: 2, 4"),
    Bad("step that is none", stored(nothing, *TO_EXPORT[:-1], "x"), "--step", "invalid int value: 'x'", "usage: verst export", code=2),
]
INSPECT = [
    Bad("no run", command("inspect", "model"), "not a run", "$ROOT/model", "made by `verst train`"),
    Bad("group that is not there", stored(nothing, "inspect", DONE, "--group", "99"), "no group 99", "done/journal", "it has groups 0 to"),
    Bad("id that is none", stored(nothing, "inspect", DONE, "--trajectory", "x"), "trajectory 'x'", "id", "GROUP/MEMBER, such as 12/3"),
    Bad("range the wrong way", stored(nothing, "inspect", DONE, "--step", "9:1"), "'9:1' is empty", "--step", "lower end", code=2),
]
RUNS = [
    Bad("no directory", command("runs", "run.yaml"), "no directory", "run.yaml", "give the one that run.dir names"),
    Bad("unknown metric", stored(nothing, "runs", "--compare", DONE, "--metric", "rewrd"), "'rewrd'", "none of these runs", "there are: "),
]
WATCH = [
    Bad("no run", command("watch", "nowhere"), "not a run", "$ROOT/nowhere", "made by `verst train`"),
]
EVAL = [
    Bad("nonsense", command("eval", "nowhere"), "neither a run nor", "nowhere", "no run.json and no config.json): give one"),
    Bad("model without prompts", command("eval", "model"), "a model alone has no prompts", "model", "Give --set NAME=FILE"),
    Bad("no temperature", stored(nothing, *TO_EVAL, "--temperature", "nan"), "nan", "--temperature", "give a number from 0"),
    Bad("output that exists", stored(nothing, *TO_EVAL, "--out", "run.yaml"), "File exists", "--out run.yaml", "give a new file"),
]
PROFILE = [
    Bad("step not journaled", stored(nothing, "profile", DONE, "--step", "9"), "no batch of step 9", "runs/done", "those of steps 1 to 4"),
]
INIT = [
    Bad("file that exists", command("init", *TO_INIT), "exists already", "run.yaml", "such as run-2.yaml"),
]
CONVERT = [
    Bad("file missing", command("convert", "none.gguf", "out"), "no such file", "$ROOT/none.gguf", "give the path of a .gguf file"),
]
USAGE = [
    Bad("unknown command", command("trian", "run.yaml"), "'trian'", "argument COMMAND", "choose from 'init', ", code=2),
    Bad("unknown option", command(*TO_NEW, "--epochs", "3"), "--epochs 3", "unrecognized arguments", "usage: verst", code=2),
]
DISK = [
    Bad("full: a new run", full("d", *TO_NEW, "run.dir=d"), "cannot make", "$ROOT/d/new.partial", "set another run.dir"),
    Bad("full: export", full("d", "export", DONE, "--out", "d/out"), "could not be copied", "$ROOT/d/out", "make room or rights there"),
    Bad(
        "full: a checkpoint's export",
        full("d", *TO_EXPORT[:3], "d/out", *TO_EXPORT[4:]),
        "could not be exported",
        "$ROOT/d/out",
        "make room",
    ),
    Bad("full: init", full("d", "init", "d/a.yaml", *TO_INIT), "cannot be written", "d/a.yaml", "make room"),
    Bad("run.dir below a file", command(*TO_NEW, "run.dir=run.yaml/x"), "run.dir", "$ROOT/run.yaml/x/new.partial", "set another run.dir"),
    Bad("export below a file", stored(nothing, *TO_EXPORT[:3], "run.yaml/x"), "could not be copied", "$ROOT/run.yaml/x", "another --out"),
    Bad(
        "output in no directory", stored(nothing, *TO_EVAL, "--out", "no/x.json"), "No such file", "--out no/x.json", "in a directory that"
    ),
]
PORTS = [
    Bad(
        "Prometheus port taken",
        in_use,
        "127.0.0.1:PORT cannot be listened at",
        "Address already in use",
        "Set tracking.prometheus_port=auto",
    ),
    Bad("no cluster there", nobody_listens(*TO_NEW, "--address", "{}"), "no Ray cluster", "127.0.0.1:", "Is the head running"),
    Bad("address that is none", command(*TO_NEW, "--address", "here"), "'here'", "address", "expected HOST:PORT"),
]
PERMISSIONS = [
    Bad("run file", unpermitted("run.yaml", 0, "check", "run.yaml"), "Permission denied", "run.yaml", "that you may read"),
    Bad("prompts", unpermitted("prompts.jsonl", 0, "check", "run.yaml"), "Permission denied", "data.path prompts.jsonl", "the right to"),
    Bad("model", unpermitted("model/config.json", 0, "check", "run.yaml"), "Permission denied", "model/config.json", "the right to"),
    Bad("model directory", unpermitted("model", 0, "check", "run.yaml"), "Permission denied", "model/config.json", "the right to"),
    Bad(
        "runs directory", unpermitted("closed", 0o555, *TO_NEW, "run.dir=closed"), "Permission", "$ROOT/closed/new.partial", "rights there"
    ),
    Bad("a run", unpermitted("runs/done", 0, "inspect", DONE), "cannot be read (Permission denied)", "$ROOT/runs/done", "made by"),
]
TABLE = {
    "config": CONFIG,
    "data": DATA,
    "model": MODEL,
    "reward": REWARD,
    "environment": ENVIRONMENT,
    "resume": RESUME,
    "checkpoint": CHECKPOINT,
    "train": TRAIN,
    "export": EXPORT,
    "inspect": INSPECT,
    "runs": RUNS,
    "watch": WATCH,
    "eval": EVAL,
    "profile": PROFILE,
    "init": INIT,
    "convert": CONVERT,
    "usage": USAGE,
    "disk": DISK,
    "ports": PORTS,
    "permissions": PERMISSIONS,
}


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


@pytest.mark.parametrize("bad", [pytest.param(bad, id=f"{area}: {bad.what}") for area, rows in TABLE.items() for bad in rows])
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
    rows = [bad for area in TABLE.values() for bad in area]
    assert len(rows) >= 55
    assert all(bad.thing and bad.place and bad.remedy for bad in rows)
