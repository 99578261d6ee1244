"""Loading user code by name, and errors that say what to change."""

from __future__ import annotations

import sys

import pytest

from verst import extend
from verst.errors import ExtensionError
from verst.protocols import Environment
from verst.types import Completion, Message, Prompt, Reply

SHIPPED = {"exact_match": len, "math": sum}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def load(reference):
    return extend.load(reference, shipped=SHIPPED, kind="reward")


def test_shipped_names_and_python_objects_are_returned():
    assert load("math") is sum
    assert load(max) is max


def test_module_of_the_working_directory_is_found_with_its_neighbours(workdir):
    (workdir / "my_helper.py").write_text("WORTH = 3\n")
    (workdir / "my_rewards.py").write_text(
        "class Box:\n    @staticmethod\n    def score(t, fields):\n        import my_helper\n        return my_helper.WORTH\n"
    )
    assert load("my_rewards:Box.score")(None, {}) == 3


def test_unknown_shipped_name_shows_the_nearest_and_how_to_write_ones_own():
    with pytest.raises(ExtensionError, match=r"reward 'exact_mach' is not shipped.*nearest: exact_match.*`module:name`"):
        load("exact_mach")


def test_missing_module_says_where_was_looked(workdir):
    with pytest.raises(ExtensionError, match=rf"no module 'no_such_module' in {workdir}"):
        load("no_such_module:score")


def test_missing_name_shows_the_module_file_and_the_nearest(workdir):
    (workdir / "my_rewards.py").write_text("def score(t, fields): return 1.0\n")
    with pytest.raises(ExtensionError, match=r"my_rewards\.py\) has no 'scor'; nearest: score"):
        load("my_rewards:scor")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\nraise RuntimeError('no licence')\n", r"RuntimeError: no licence \(.*broken\.py:2: raise RuntimeError"),
        ("import surely_missing_package\n", r"No module named 'surely_missing_package' \(.*broken\.py:1: import surely"),
        ("def f(:\n", r"broken\.py\", line 1[\s\S]*SyntaxError"),
    ],
)
def test_module_that_raises_shows_its_own_error_with_file_and_line(workdir, source, expected):
    (workdir / "broken.py").write_text(source)
    with pytest.raises(ExtensionError, match=expected) as caught:
        load("broken:score")
    assert caught.value.__cause__ is not None


def test_check_callable_binds_parameters_and_options():
    def score(trajectory, fields, *, digits=2): ...

    extend.check_callable(score, "reward", ("trajectory", "fields"), {"digits": 3})
    extend.check_callable(max, "reward", ("trajectory", "fields"))  # no readable signature
    with pytest.raises(
        ExtensionError, match=r"score\(trajectory, fields, \*, digits=2\) in .*test_extend.py:\d+ cannot be called as .*nearest: digits"
    ):
        extend.check_callable(score, "reward", ("trajectory", "fields"), {"digit": 3})
    with pytest.raises(ExtensionError, match="missing a required argument: 'fields'"):
        extend.check_callable(score, "reward", ("trajectory",))
    with pytest.raises(ExtensionError, match="reward is 3 of type int, which cannot be called"):
        extend.check_callable(3, "reward", ())


class Good:
    def __init__(self, level: int = 1) -> None: ...

    async def start(self, prompt: Prompt) -> list[Message]:
        return list(prompt.messages)

    async def reply(self, completion: Completion) -> Reply:
        return Reply()


class NoReply:
    async def start(self, prompt): ...

    async def repl(self, completion): ...


class NotAsync(Good):
    def reply(self, completion): ...  # pyright: ignore[reportIncompatibleMethodOverride]


class TooFew(Good):
    async def reply(self): ...  # pyright: ignore[reportIncompatibleMethodOverride]


def test_check_class_accepts_a_class_that_fits_and_a_factory():
    extend.check_class(Good, "environment", Environment, {"level": 2})
    extend.check_class(lambda level: Good(level), "environment", Environment, {"level": 2})


@pytest.mark.parametrize(
    ("found", "options", "expected"),
    [
        (NoReply, {}, r"NoReply in .* has no method 'reply'; nearest: repl; expected: async def reply\(self, completion: 'Completion'\)"),
        (NotAsync, {}, r"'reply' must be an `async def`"),
        (TooFew, {}, r"reply\(self\) does not fit: too many positional arguments; expected: async def reply"),
        (Good, {"levle": 1}, r"unexpected keyword argument 'levle'; nearest: level"),
        (Good(), {}, r"give the class or a function that makes one"),
        (7, {}, r"give the class or a function that makes one"),
    ],
)
def test_check_class_errors_show_what_is_expected(found, options, expected):
    with pytest.raises(ExtensionError, match=expected):
        extend.check_class(found, "environment", Environment, options)


def test_a_value_in_a_message_may_be_one_that_cannot_be_shown():
    class Hidden:
        def __repr__(self) -> str:
            raise LookupError

    class Halves:
        def __repr__(self) -> str:
            return "\ud83d" * 100

    assert extend.described(Hidden()) == "a value whose repr raises LookupError of type Hidden"
    assert extend.described(Halves()) == "\\ud83d" * 13 + "\\u of type Halves"
    assert extend.described(None) == "None of type NoneType"
    assert extend.described("x" * 100) == f"'{'x' * 79} of type str"
