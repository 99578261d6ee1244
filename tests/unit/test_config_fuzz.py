"""Arbitrary run files, overrides and command lines: each is taken, or refused in words for a person. None ends in a traceback.

What to write into a file is drawn from the schema itself, so a new option is tried without a change here. The suite tries the same examples
each time; `VERST_FUZZ_EXAMPLES=20000 pytest tests/unit/test_config_fuzz.py` looks for new ones.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from verst import cli
from verst.config.algorithms import PRESETS
from verst.config.load import dump_config, load_config, option_names
from verst.config.schema import Config
from verst.config.text import NotYaml, key_lines, parse
from verst.errors import ConfigError, VerstError
from verst.runtime import launch, preflight
from verst.testing import tiny_model

EXAMPLES = int(os.environ.get("VERST_FUZZ_EXAMPLES", "0"))
SCHEMA = Config.model_json_schema()
SECTIONS = list(SCHEMA["properties"])
OPTIONS = sorted({name for preset in PRESETS for name in option_names(preset)})
MINIMAL: dict[str, Any] = {"run": {"steps": 3}, "model": {"path": "model"}, "data": {"path": "prompts.jsonl"}}
ODD_TEXT = [
    "",
    " ",
    "yes",
    "null",
    "1e400",
    "-0",
    "0x",
    "a: b",
    "*a",
    "\t",
    "é\u2028\U0001f600",
    "\x00",
    "\udcff",
    "a" * 300,
    "../..",
    "~",
    "{",
    "%s",
]
ODD_YAML = [
    "\t",
    "\n",
    ": ",
    "- ",
    "{",
    "}",
    "[",
    "&a ",
    "*a",
    "!!int ",
    "!!python/name:os.system ",
    "'",
    '"',
    "---\n",
    "? ",
    "2026-99-99",
    "\x07",
    "<<: ",
]
JARGON = re.compile(r"pydantic|Input should be|Traceback|<unicode string>|(Run|Model|Train|Grpo|Sft|Correction)Config")


def tried(examples: int) -> settings:
    """So many examples, always the same ones; or as many new ones as the environment asks for."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, deadline=None, database=None, suppress_health_check=slow)


# ---- what may stand in a run file


def options_of(section: str) -> dict[str, Any]:
    """Name and JSON schema of a section's options; those of all algorithms."""
    about = SCHEMA["properties"][section]
    found: dict[str, Any] = {}
    for part in about.get("oneOf", [about]):
        found |= SCHEMA["$defs"][part["$ref"].rpartition("/")[2]]["properties"]
    return found


def fitting(about: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that an option may have by its schema alone; rules between options may refuse them."""
    if "$ref" in about:
        found = SCHEMA["$defs"][about["$ref"].rpartition("/")[2]]
        return (
            st.fixed_dictionaries({}, optional={k: fitting(v) for k, v in found["properties"].items()})
            if "properties" in found
            else json_values
        )
    if "anyOf" in about:
        return st.one_of([fitting(part) for part in about["anyOf"]])
    if "enum" in about or "const" in about:
        return st.sampled_from(about.get("enum") or [about["const"]])
    if "prefixItems" in about:
        return st.tuples(*map(fitting, about["prefixItems"])).map(list)
    low = about.get("ge", about.get("minimum", about.get("gt", about.get("exclusiveMinimum", 0))))
    high = about.get("le", about.get("maximum", about.get("lt", about.get("exclusiveMaximum", 2**20))))
    strategies: dict[str, st.SearchStrategy[Any]] = {
        "boolean": st.booleans(),
        "integer": st.integers(low, min(high, 2**20)),
        "number": st.floats(low, high),
        "string": st.sampled_from(["a", "model", "prompts.jsonl", "mine:score", "regex", "second_try"]) | st.text(min_size=1, max_size=20),
        "null": st.none(),
    }
    if about["type"] == "array":
        return st.lists(fitting(about["items"]), max_size=3)
    if about["type"] == "object":
        return st.dictionaries(st.text(max_size=8), json_values, max_size=3)
    return strategies[about["type"]]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(ODD_TEXT)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
anything: st.SearchStrategy[Any] = st.recursive(
    scalars | st.just(10**400) | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars.filter(lambda v: v == v), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def run_files(draw: st.DrawFn, wrong: st.SearchStrategy[Any] | None = None) -> dict[Any, Any]:
    """The minimal run with some options set; with `wrong`, some of them to that, and some that there are not."""
    values: dict[Any, Any] = {section: dict(options) for section, options in MINIMAL.items()}
    for _ in range(draw(st.integers(0, 4))):
        section = draw(st.sampled_from(SECTIONS))
        known = options_of(section)
        name = draw(st.sampled_from(list(known)))
        part = values.setdefault(section, {"name": draw(st.sampled_from(list(PRESETS)))} if section == "algorithm" else {})
        if not isinstance(part, dict):
            continue
        part[name] = draw(fitting(known[name]) if wrong is None else fitting(known[name]) | wrong)
    if wrong is not None and draw(st.booleans()):
        place = draw(st.sampled_from([values, *(part for part in values.values() if isinstance(part, dict))]))
        place[draw(scalars.filter(lambda v: v == v))] = draw(wrong)
        if draw(st.booleans()):
            values[draw(st.sampled_from(SECTIONS))] = draw(wrong)
    return values


overrides = st.lists(
    st.builds(
        "{}={}".format,
        st.sampled_from([*OPTIONS, *SECTIONS, "train.lrr", "a.b.c"]),
        st.text(max_size=12) | st.sampled_from(ODD_TEXT + ODD_YAML),
    )
    | st.text(max_size=20),
    max_size=3,
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """The YAML of a run file, with some characters replaced, lost or put in."""
    text = yaml.safe_dump(draw(run_files(json_values)), sort_keys=False, default_flow_style=draw(st.sampled_from([None, False, True])))
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 5))
        text = text[:at] + draw(st.sampled_from(ODD_YAML) | st.text(max_size=4)) + text[at + length :]
    return text


# ---- what must hold


def refusal(*arguments: Any) -> str | None:
    """What `load_config` says; None if it takes it. Any other error is this test's failure."""
    try:
        load_config(*arguments)
    except ConfigError as error:
        return str(error)
    return None


def assert_told(message: str) -> None:
    """In words for a person: no jargon, no wall of text, and something is named in each line."""
    assert not JARGON.search(message)
    for line in message.splitlines():
        assert len(line) < 1500
        assert re.search(r"[\w…']{2,}", line.partition(": ")[2])


@tried(150)
@given(run_files(anything), overrides)
def test_a_mapping_is_taken_or_refused_in_words(values: dict[Any, Any], given_overrides: list[str]):
    message = refusal(values, given_overrides)
    if message is not None:
        assert_told(message)
        names = {*OPTIONS, *SECTIONS, *(form for key in keys_of(values) for form in (shown(str(key)), repr(key)[:40]))}
        for line in message.splitlines():
            assert line.startswith("override ") or any(name in line for name in names)


def keys_of(values: dict[Any, Any]) -> list[Any]:
    return [*values, *(key for value in values.values() if isinstance(value, dict) for key in keys_of(value))]


def shown(name: str) -> str:
    return (name if name.isprintable() else repr(name)[1:-1])[:40]


@tried(150)
@given(texts(), overrides)
def test_a_file_is_taken_or_refused_with_the_line(tmp_path: Path, text: str, given_overrides: list[str]):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = refusal(path, given_overrides)
    if message is None:
        return
    assert_told(message)
    if given_overrides:
        return
    with contextlib.suppress(NotYaml):
        lines = key_lines(parse(path.read_text(encoding="utf-8", errors="replace"))[1])
        for told in message.splitlines():
            found = re.match(r"\S+?run\.yaml(?::(\d+))?: (?:unknown option )?(\S+?)(?=[ ;:,]|$)", told)
            if found and (key := tuple(found[2].split("."))) in lines:
                assert int(found[1] or 0) == lines[key], told


@tried(60)
@given(run_files())
def test_a_valid_configuration_reads_back_from_what_is_dumped(tmp_path: Path, values: dict[str, Any]):
    try:
        config = load_config(values)
    except ConfigError:
        assume(False)  # rules between options
        raise
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8", errors="surrogatepass")
    assert dump_config(load_config(path)) == dump_config(config)


# ---- the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, prompts and a run file, in which no command starts a process or loads a model."""
    from verst.runtime import cluster, evaluation

    def stops_here(*arguments: Any, **options: Any) -> Any:
        raise VerstError("this is as far as the test goes")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_supervise", stops_here)
    monkeypatch.setattr(cluster, "_try", stops_here)
    monkeypatch.setattr(evaluation, "evaluate", stops_here)
    monkeypatch.setattr("verst.doctor.examine", stops_here)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(preflight, "check_stack", lambda config: None)  # imports SGLang and Megatron-Core
    tiny_model("model")
    Path("prompts.jsonl").write_text('{"prompt": "one", "answer": "1"}\n{"prompt": "two", "answer": "2"}\n')
    Path("run.yaml").write_text(yaml.safe_dump(MINIMAL | {"data": {"path": "prompts.jsonl", "max_prompt_tokens": 64}}))
    return tmp_path


def said_by(arguments: list[str]) -> str:
    """Standard error of a command, which must end with one of its exit codes."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")), contextlib.redirect_stderr(errors):
        try:
            code = cli.main(arguments)
        except SystemExit as ended:  # argparse
            code = ended.code
    assert code in (0, 1, 2)
    assert "Traceback" not in errors.getvalue()
    assert (code == 0) or errors.getvalue().strip()
    return errors.getvalue()


COMMANDS = {
    name: [option for action in parser._actions for option in action.option_strings]
    for action in cli.build_parser()._actions
    if isinstance(choices := action.choices, dict)
    for name, parser in choices.items()
}
PLACES = [
    "run.yaml",
    "model",
    "prompts.jsonl",
    "runs",
    "runs/run",
    "runs/run@1",
    "nowhere",
    ".",
    "",
    "/",
    "model/config.json",
    "a=b",
    "x" * 300,
]
NUMBERS = ["0", "1", "-1", "3:1", "1:", "nan", "inf", "1e400", "9" * 5000, "1,2", "x", "127.0.0.1:1", "12/3"]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(list(COMMANDS)))
    word = (
        st.sampled_from(PLACES)
        | st.sampled_from(NUMBERS)
        | st.sampled_from(COMMANDS[name])
        | st.builds("{}={}".format, st.sampled_from(OPTIONS), st.sampled_from(ODD_TEXT[:-6] + NUMBERS + PLACES))
        | st.text(st.characters(exclude_characters="\x00"), max_size=10)
        | st.just("\udcff")
    )
    usual = draw(
        st.sampled_from(
            [
                [],
                ["run.yaml"],
                ["runs/run"],
                ["model"],
                ["runs/run", "--out", "out"],
                ["a.yaml", "--task", "prompts.jsonl", "--model", "model"],
            ]
        )
    )
    return [name, *usual, *draw(st.lists(word, max_size=4))]


@pytest.mark.filterwarnings("ignore")
@tried(120)
@given(lines=st.lists(command_lines() | st.lists(st.text(max_size=8), max_size=3), min_size=1, max_size=4))
def test_no_command_line_ends_in_a_traceback(here: Path, lines: list[list[str]]):
    for line in lines:
        said_by(line)


@tried(80)
@given(values=run_files(json_values))
def test_check_goes_as_far_as_it_can(here: Path, values: dict[Any, Any]):
    Path("any.yaml").write_text(yaml.safe_dump(values))
    assert_told(said_by(["check", "any.yaml"]))
