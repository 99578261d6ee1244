"""What is trained against what was generated, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.loop.fakes import group
from verst.runtime.bias import Bias
from verst.types import Group, Status


def rolled(seq: int, lengths: list[int], version: int = 0, cut: tuple[int, ...] = ()) -> Group:
    """A group whose trajectories have so many generated tokens, all of one version."""
    made = group(seq, version, rewards=[1.0] * len(lengths))
    trajectories = [
        replace(
            t,
            tokens_T=np.arange(length, dtype=np.int32),
            loss_mask_T=np.ones(length, np.bool_),
            logprobs_T=np.zeros(length, np.float32),
            versions_T=np.full(length, version, np.int32),
        )
        for t, length in zip(made.trajectories, lengths, strict=True)
    ]
    return replace(made, trajectories=tuple(trajectories), cut=cut)


def test_length_is_what_was_trained_over_what_was_generated():
    bias = Bias()
    first, second = rolled(0, [10, 30]), rolled(1, [40, 80])
    for made in (first, second):
        bias.admitted(made.seq)
        bias.generated(made)
    assert bias.trained([first], 0)["bias/length"] == pytest.approx(20 / 40)  # (10 + 30) / 2 over (10 + 30 + 40 + 80) / 4
    assert bias.trained([second], 1)["bias/length"] == pytest.approx(1.0)  # over both steps: all that was generated is trained


def test_only_the_last_ten_steps_count():
    bias = Bias()
    found = {}
    for step in range(12):
        made = rolled(step, [100 if step < 2 else 10], cut=(20,) if step < 2 else ())
        bias.admitted(step)
        bias.generated(made)
        found = bias.trained([made], step)
    assert found["bias/length"] == pytest.approx(1.0)


def test_what_was_cut_counts_as_generated():
    bias = Bias()
    made = rolled(0, [10, 20], cut=(60, 30))
    bias.admitted(0)
    bias.generated(made)
    found = bias.trained([made], 0)
    assert found["bias/length"] == pytest.approx(15 / 30)
    assert found["rollout/cut"] == pytest.approx(0.5)


def test_dropped_groups_were_generated_and_failed_trajectories_have_no_length():
    bias = Bias()
    kept, dropped = rolled(0, [10, 20]), rolled(1, [60, 90])
    broken = replace(dropped.trajectories[1], status=Status.FAILED, error="gone")
    for made in (kept, replace(dropped, trajectories=(dropped.trajectories[0], broken))):
        bias.admitted(made.seq)
        bias.generated(made)
    bias.dropped(1)
    assert bias.trained([kept], 0)["bias/length"] == pytest.approx(15 / 30)


def test_passed_counts_the_later_groups_trained_before():
    bias = Bias()
    for seq in range(6):
        bias.admitted(seq)
    groups = [rolled(seq, [5]) for seq in range(6)]
    assert bias.trained([groups[1], groups[2]], 0)["bias/passed"] == 0
    assert bias.trained([groups[3]], 1)["bias/passed"] == 0
    assert bias.trained([groups[0]], 2)["bias/passed"] == 3
    assert bias.trained([groups[5], groups[4]], 3)["bias/passed"] == 0  # in one batch, neither is before the other
    assert not bias._trained


def test_age_compares_the_longer_half_with_the_others():
    bias = Bias()
    groups = [rolled(0, [100, 90], version=1), rolled(1, [10, 20], version=3)]
    assert bias.trained(groups, 4)["bias/age"] == pytest.approx(3 - 1)
    assert "bias/age" not in bias.trained([rolled(2, [5, 5], version=4)], 5)  # all of one length


def test_demonstrations_were_not_generated():
    bias = Bias()
    made = rolled(0, [5, 9], version=-1)
    bias.admitted(0)
    bias.generated(made)
    assert bias.trained([made], 3) == {"rollout/cut": 0.0, "bias/passed": 0.0}
