"""What the pages quote is there: messages of the source, files of the repository."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from verst.config.load import load_config
from verst.rewards.judge import Judge

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
QUOTES = re.findall(r"^> `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts of a module with … in place of values, those joined by + as one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
            yield template(node)


def template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


@pytest.fixture(scope="module")
def source() -> list[str]:
    return [text for file in sorted((ROOT / "verst").rglob("*.py")) for text in texts(ast.parse(file.read_text(encoding="utf-8")))]


def quoted(quote: str) -> re.Pattern[str]:
    """A quote as a pattern: its fixed parts in order."""
    return re.compile(".*".join(re.escape(part) for part in quote.split("…")), re.DOTALL)


@pytest.mark.parametrize("quote", QUOTES)
def test_a_message_is_still_in_the_source(quote: str, source: list[str]):
    fixed = re.sub(r"[^A-Za-z]", "", quote)
    assert len(fixed) >= 4, "too little to search for"
    assert any(quoted(quote).search(text) for text in source), "no message reads so any more: quote the new one in docs/troubleshooting.md"


def test_the_quotes_are_found():
    assert len(QUOTES) > 50


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *DOCS.glob("*.md")]), ids=lambda p: p.name)
def test_files_named_in_a_page_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:docs|examples|benchmarks|tests|verst)/[\w./-]+\.(?:md|py|yaml|toml|svg|png))`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    linked = re.findall(r"\]\(((?!https?:)[^)#]+)", text)
    assert not [target for target in linked if not (page.parent / target).exists()]


REWARDS = (DOCS / "rewards.md").read_text(encoding="utf-8")
RUN = {"run": {"steps": 1}, "model": {"path": "m"}}


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", REWARDS, re.DOTALL))
def test_a_part_of_a_run_file_in_the_page_of_rewards_loads(block: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(yaml.dump(RUN) + block)
    load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("option", re.findall(r"`([\w.]+: [^`]+)`", REWARDS))
def test_an_option_in_the_page_of_rewards_loads(option: str):
    name, _, value = option.partition(": ")
    load_config(RUN, [f"reward.options.{name.removeprefix('reward.options.')}={value}"])


def test_the_words_that_the_judge_shows_load():
    (shown,) = re.findall(r"`(\{[^`]*: [^`]*\})`", str(Judge.__doc__))
    assert load_config(RUN, [f"reward.options.choices={shown}"]).reward.options == {"choices": {"yes": 1, "no": 0}}
