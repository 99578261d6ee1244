"""Metrics merge to the same numbers however the work was split."""

from __future__ import annotations

import math
import re

from tests.reference import DOCUMENT, documented, undocumented
from verst.observe.metrics import Tally, merged


def test_means_are_weighted_over_unequal_parts():
    # 1 token with loss 5 on one rank, 3 tokens with losses summing to 3 on the other: (5 + 3) / 4 = 2, not (5 + 1) / 2 = 3
    a, b = Tally(), Tally()
    a.mean("loss", 5.0, 1)
    b.mean("loss", 3.0, 3)
    assert merged([a, b]).report() == {"loss": 2.0}
    assert a.report() == {"loss": 5.0}  # the parts are left as they were


def test_a_mean_over_nothing_is_unknown_not_zero():
    tally = Tally()
    tally.mean("reward", 0.0, 0)
    assert tally.report() == {}


def test_nan_is_never_hidden_by_a_larger_number():
    tally = Tally()
    tally.peak("worst", math.nan)
    tally.peak("worst", 3.0)
    assert math.isnan(tally.report()["worst"])


def test_the_reference_knows_what_it_explains():
    names = documented()
    assert len(names) == len(set(names)) > 70
    assert undocumented([{"kind": "step", "step": 1, "reward": 0.5, "mismatch/age_2/k3": 0.0, "routes/differ/layer_11": 0.0}]) == set()
    assert undocumented([{"reward/median": 0.5}, {"new": 1.0}]) == {"reward/median", "new"}


def test_the_reference_explains_nothing_that_no_code_names():
    source = "\n".join(path.read_text() for path in (DOCUMENT.parents[1] / "verst").rglob("*.py"))
    last = {name: re.sub(r"_s$", "", name.rstrip("*").rstrip("/").rpartition("/")[2]) for name in documented()}
    assert [name for name, part in last.items() if part not in source] == []
