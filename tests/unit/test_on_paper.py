"""What `verst check` says of user code, from its source alone: the words of the start, and nothing of what would run."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_preflight import check
from verst import extend
from verst.algorithms.own import own_advantages, with_own_loss
from verst.algorithms.table import algorithm_for
from verst.config.algorithms import GrpoConfig
from verst.errors import ExtensionError
from verst.filters.spec import FilterSpec
from verst.hooks import HookSpec
from verst.model_spec import install
from verst.on_paper import stand_in
from verst.protocols import Environment, Reward
from verst.rewards.spec import RewardSpec
from verst.rollout.environments import environment_factory

EXAMPLES = Path(__file__).parents[2] / "examples"

MINE = """
from verst.protocols import Environment as Base

class Env:
    def __init__(self, turns=3, *, hint="no"): ...
    async def start(self, prompt): ...
    async def reply(self, completion): ...

class NoReply:
    async def start(self, prompt): ...
    async def repyl(self, completion): ...

class SyncReply(Env):
    def reply(self, completion): ...

class WrongReply(Env):
    async def reply(self, completion, more): ...

class Inherits(Base):
    turns = 2

def factory(turns=1): ...

async def roll(session, prompt, *, think=4): ...
def sync_roll(session, prompt): ...
async def swapped(prompt, session): ...
async def generate(args, sample): ...

def score(trajectory, fields, *, close=0.5): ...
def one(trajectory): ...
def turned(fields, trajectory): ...

class Scores:
    def __init__(self, scale=1): ...
    def __call__(self, trajectory): ...

class Judge:
    async def __call__(self, trajectory, fields): ...

def keeps(group, share=0.5): ...
async def waits(group): ...

class Hook:
    def __init__(self, window=10): ...
    def after_step(self, step, metrics): ...

class Turned:
    def after_step(self, metrics, step): ...

class AsyncHook:
    async def after_step(self, step, metrics): ...

def advantages(rewards_N, groups_N, samples): ...
def loss(inputs): ...
def backwards(groups_N, rewards_N, samples): ...
async def later(inputs): ...

class Spec:
    def checkpoint_name(self, parameter): ...
    def moe(self): ...
    def megatron_family(self): ...
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with modules that nobody has imported."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def score(trajectory, fields):\n    return 1 +\n")
    (tmp_path / "late.py").write_text("return 1\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "space").mkdir()
    (tmp_path / "package/__init__.py").write_text("")
    (tmp_path / "package/within.py").write_text("def score(trajectory, fields): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in {"mine", "broken", "late", "package", "space", "odd"}:
            del sys.modules[name]


def grpo(**given: str) -> Any:
    return GrpoConfig.model_validate(given)


STARTS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "environment": environment_factory,
    "reward": lambda name, options: RewardSpec(name, options).build(),
    "filter": lambda name, options: FilterSpec(name, options).build(),
    "hook": lambda name, options: HookSpec(name, options).open(),
    "advantages": lambda name, _: own_advantages(grpo(advantages=name)),
    "loss": lambda name, _: with_own_loss(algorithm_for(grpo(loss=name)), grpo(loss=name)),
    "model spec": lambda name, _: install(name),
}
OVERRIDES = {
    "environment": ("rollout.environment={}", "rollout.environment_options={}", "rollout.max_turns=9"),
    "reward": ("reward.function={}", "reward.options={}"),
    "filter": ("filters.functions={{'{}': {}}}",),
    "hook": ("hooks.classes={{'{}': {}}}",),
    "advantages": ("algorithm={{name: grpo, advantages: '{}'}}",),
    "loss": ("algorithm={{name: grpo, loss: '{}'}}",),
    "model spec": ("model.spec={}",),
}


def on_paper(model: Path, kind: str, name: str, options: str) -> None:
    first, *more = OVERRIDES[kind]
    check(model, first.format(name, options), *(text.format(options) for text in more))


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        ("environment", "mine:Nope", {}, r"module mine \(.*mine\.py\) has no 'Nope'"),
        ("environment", "mine:NoReply", {}, r"has no method 'reply'; nearest: repyl; expected: async def reply\(self, completion"),
        ("environment", "mine:SyncReply", {}, "'reply' must be an `async def`"),
        ("environment", "mine:WrongReply", {}, "missing a required argument: 'more'"),
        ("environment", "mine:Env", {"turn": 2}, "unexpected keyword argument 'turn'; nearest: turns"),
        ("environment", "mine:factory", {"hint": 2}, "Expected: a class with async def start"),
        ("environment", "rollout:mine:sync_roll", {}, "is no `async def`"),
        ("environment", "rollout:mine:swapped", {}, "its parameter 'prompt' would be given session"),
        ("environment", "rollout:mine:roll", {"thing": 1}, "nearest: think"),
        ("environment", "agent:mine:one", {}, r"cannot be called as one\(session, prompt\)"),
        ("environment", "slime:mine:generate", {}, "cannot be called as slime calls it"),
        ("reward", "mine:scor", {}, "nearest: score"),
        ("reward", "mine:one", {}, r"too many positional arguments"),
        ("reward", "mine:turned", {}, r"turned\(trajectory, fields\): its parameter 'fields' would be given trajectory"),
        ("reward", "mine:score", {"far": 1}, "unexpected keyword argument 'far'"),
        ("reward", "mine:Scores", {"scale": 2}, "too many positional arguments"),
        ("reward", "mine:Judge", {"scale": 2}, "unexpected keyword argument 'scale'|takes no arguments|too many"),
        ("reward", "broken:score", {}, r"module broken could not be imported: .*broken\.py.*SyntaxError: invalid syntax: mend the module"),
        ("reward", "late:score", {}, "'return' outside function"),
        ("reward", "package.nothing:score", {}, r"no module 'package\.nothing' in"),
        ("reward", "space.nothing:score", {}, r"no module 'space\.nothing' in"),
        ("reward", "mine.nothing:score", {}, r"no module 'mine\.nothing' in"),
        ("reward", "trl:mine:score", {}, "which TRL could not call either"),
        ("filter", "mine:waits", {}, "is async: write a plain `def`"),
        ("filter", "mine:keeps", {"shares": 1}, "nearest: share"),
        ("hook", "mine:one", {}, "Expected: a class with def after_step"),
        ("hook", "mine:Env", {}, "has no method 'after_step'"),
        ("hook", "mine:AsyncHook", {}, "after_step is async"),
        ("hook", "mine:Turned", {}, "its parameter 'metrics' would be given step"),
        ("advantages", "mine:backwards", {}, "its parameter 'groups_N' would be given rewards_N"),
        ("advantages", "mine:Env", {}, "cannot be called as Env"),
        ("loss", "mine:later", {}, "is async"),
        ("model spec", "mine:score", {}, "has no model_type"),
    ],
)
def test_what_the_start_would_refuse_is_refused_in_its_words(
    place: Path, tiny: Path, kind: str, name: str, options: dict[str, Any], message: str
):
    with pytest.raises(ExtensionError, match=re.compile(message, re.DOTALL)) as found:
        on_paper(tiny, kind, name, str(options))
    assert not {"mine", "broken", "late"} & sys.modules.keys()
    with pytest.raises(ExtensionError) as at_the_start:
        STARTS[kind](name, options)
    assert re.sub("0x[0-9a-f]+", "", str(found.value)) == re.sub("0x[0-9a-f]+", "", str(at_the_start.value))


def test_a_class_is_no_function_of_trl(place: Path, tiny: Path):
    with pytest.raises(ExtensionError, match=r"reward 'mine:Judge' is <class '.*Judge'> of type type: give a function"):
        on_paper(tiny, "reward", "trl:mine:Judge", "{}")


def test_a_loader_of_verifiers_is_read_too(place: Path, tiny: Path):
    with pytest.raises(ExtensionError, match=r"environment factory\(turns=1\) in .*mine\.py:\d+ cannot be called as factory\(turn=2\)"):
        on_paper(tiny, "environment", "verifiers:mine:factory", "{turn: 2}")


def test_the_methods_of_a_model_spec_are_read(place: Path, tiny: Path):
    with pytest.raises(ExtensionError, match=r"model spec Spec\.moe\(\) in .*mine\.py:\d+ cannot be called as Spec\.moe\(config\)"):
        on_paper(tiny, "model spec", "mine:Spec", "{}")


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("environment", "mine:Env", "{turns: 2, hint: yes}"),
        ("environment", "mine:Inherits", "{}"),
        ("environment", "mine:factory", "{turns: 2}"),
        ("environment", "rollout:mine:roll", "{think: 1}"),
        ("environment", "agent:mine:sync_roll", "{}"),
        ("reward", "mine:score", "{close: 1}"),
        ("reward", "mine:Judge", "{}"),
        ("reward", "package.within:score", "{}"),
        ("filter", "mine:keeps", "{share: 1}"),
        ("hook", "mine:Hook", "{window: 1}"),
        ("advantages", "mine:advantages", ""),
        ("loss", "mine:loss", ""),
    ],
)
def test_what_fits_is_accepted_without_an_import(place: Path, tiny: Path, kind: str, name: str, options: str):
    (place / "mine.py").write_text(f"{MINE}\nraise AssertionError('imported')\n")
    on_paper(tiny, kind, name, options)
    assert not {"mine", "package"} & sys.modules.keys()


@pytest.mark.parametrize(
    "source",
    [
        "from mine import score",
        "import mine as score",
        "from mine import *",
        "score = lambda *_: 1",
        "score: int = 1",
        "wrap = print\n@wrap\ndef score(): ...",
        "try:\n    from mine import score\nexcept ImportError:\n    def score(): ...",
        "def score(): ...\nscore = print",
        "def score(): ...\nscore.__signature__ = 1",
        "def score(): ...\ndef change():\n    global score\n    score = 1",
        "globals()['score'] = print",
        "import sys\nsetattr(sys.modules[__name__], 'score', print)",
        "def __getattr__(name): ...",
        "for score in (print,): ...",
        "with open('x') as score: ...",
        "(score := print)",
        "match print:\n    case score: ...",
        "from elsewhere import Base\nclass score(Base): ...",
        "class Base(Base_): ...\nclass score(Base): ...",
        "class score(metaclass=type): ...",
        "class score:\n    def __new__(cls): ...",
        "class score:\n    __call__ = print",
        "class score:\n    if 1:\n        def __call__(self): ...\n    else:\n        def __call__(self, a): ...",
        "class score:\n    @print\n    def __call__(self): ...",
        "class Base:\n    def __init_subclass__(cls): ...\nclass score(Base): ...",
        "def score(): ...\ndef other():\n    return exec('')",
    ],
)
def test_what_the_source_does_not_settle_is_passed_over(place: Path, source: str):
    (place / "odd.py").write_text(source)
    assert stand_in("odd:score", "reward", Reward) is None


def test_other_places_that_only_an_import_knows_are_passed_over(place: Path):
    assert stand_in("package:within.score", "reward", Reward) is None
    (place / "package/__init__.py").write_text("__path__ = ['elsewhere']\n")
    for reference in ("package.nothing:score", "os.path:join", "math:sqrt", "mine:Env.start", "no_such_module_here:score"):
        assert stand_in(reference, "reward", Reward) is None


def test_a_stand_in_has_the_signature_and_the_place_of_what_it_stands_for(place: Path):
    (place / "odd.py").write_text("X = 1\n\nasync def score(a, /, b=[X, 1], *more, c, d={'k': X}, **others): raise ValueError\n")
    found = stand_in("odd:score", "reward", Reward)
    assert str(inspect.signature(found)) == "(a, /, b=[X, 1], *more, c, d={'k': X}, **others)"
    assert (inspect.getsourcefile(found), found.__code__.co_firstlineno) == (str(place / "odd.py"), 3)
    assert extend.is_async(found)
    extend.check_class(stand_in("mine:Env", "environment", Environment), "environment", Environment, {"turns": 2})


@pytest.mark.parametrize(
    ("directory", "kind", "name"),
    [
        ("environments", "environment", "own:RunningTotal"),
        ("rollouts", "environment", "rollout:budget:think"),
        ("rollouts", "environment", "slime:from_slime:generate"),
        ("agents", "environment", "agent:double_check:solve"),
        ("rewards", "reward", "own:score"),
        ("rewards", "reward", "group:shortest_right"),
        ("rewards", "reward", "slime:from_slime:rm"),
        ("rewards", "reward", "trl:from_trl:correct+from_trl:brief"),
        ("extensions", "filter", "refusals:refusals"),
        ("extensions", "hook", "smoothed:Smoothed"),
        ("algorithms", "advantages", "own:advantages"),
        ("algorithms", "loss", "own:loss"),
        ("models", "model spec", "gated:Spec"),
    ],
)
def test_the_examples_are_accepted(tiny: Path, monkeypatch: pytest.MonkeyPatch, directory: str, kind: str, name: str):
    monkeypatch.chdir(EXAMPLES / directory)
    on_paper(tiny, kind, name, "{}")
