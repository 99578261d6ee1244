"""The table of extension points in docs/extending.md, compared with the code: eight, each with protocol, option, example and contract."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from verst import protocols, testing
from verst.config.load import option_names

ROOT = Path(__file__).parents[2]
_ROW = re.compile(
    r"^\| \[(?P<point>[^]]+)\].* \| `(?P<protocol>\w+)` \| `(?P<option>[\w.]+)[^`]*` \| `(?P<example>\S+\.py)` \| `(?P<contract>\w+)` \|$",
    re.MULTILINE,
)
POINTS = {row["point"]: row for row in _ROW.finditer((ROOT / "docs/extending.md").read_text(encoding="utf-8"))}


def test_there_are_eight():
    expected = ["Rollout", "Environment", "Reward", "Advantages", "Loss", "Filter", "Training hook", "Model spec"]
    assert list(POINTS) == expected


@pytest.mark.parametrize("row", POINTS.values(), ids=list(POINTS))
def test_each_has_a_protocol_an_option_a_small_example_and_a_contract(row: re.Match[str]):
    assert hasattr(protocols, row["protocol"])
    assert callable(getattr(testing, row["contract"]))
    assert row["option"] in option_names()
    example = (ROOT / row["example"]).read_text(encoding="utf-8").splitlines()
    assert len(example) <= 30
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    assert any(row["contract"] in text and _names(text, row["example"]) for text in texts), f"no test runs {row['example']} by its contract"


def _names(text: str, example: str) -> bool:
    """Whether a test reads this example: by its path, or by its directory and name."""
    directory, _, name = example.rpartition("/")
    return example in text or (f'"{directory}"' in text and (name in text or name.removesuffix(".py") in text))
