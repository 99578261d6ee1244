"""What a person sees while a run goes on, where there is no live view: one plain line for each step. And how figures are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PHASES = (
    "rollout",
    "lease",
    "load",
    "forward_backward",
    "optimizer",
    "publish",
    "commit",
    "snapshot",
    "pull_wait",
    "evaluate",
    "checkpoint",
    "recover",
    "hooks",
)
_SHOWN_IF_ANY = ("rollout/failed", "update/skipped", "checkpoint/failed")
_SHORT = {"forward_backward": "fwd+bwd", "pull_wait": "pull"}
_STEP_LINE = re.compile(r"step +\d+/\d+  ")
_SET_REWARD = re.compile(r"eval/([^/]+)/reward")
FORMS = {
    "reward": "{:.3f}",
    "eval/reward": "{:.3f}",
    "loss/total": "{:+.4f}",
    "policy/kl": "{:.4f}",
    "policy/entropy": "{:.3f}",
    "update/grad_norm": "{:.3g}",
    "update/lr": "{:.2e}",
    "mismatch/k3": "{:.1e}",
    "stale_mismatch/k3": "{:.1e}",
    "mismatch/abs_max": "{:.1e}",
    "mismatch/probe": "{:.1e}",
    "routes/differ": "{:.1%}",
    "staleness/max": "{:.0f}",
    "rollout/failed": "{:.1%}",
    "rollout/truncated": "{:.1%}",
    "rollout/generated_tokens": "{:,.1f}",
    "update/skipped": "{:.0%}",
    "checkpoint/failed": "{:.0f}",
    "tokens_per_s": "{:,.0f}",
    "time/step_s": "{:,.2f}",
}
"""How each metric is written for a person."""


def written(name: str, value: float) -> str:
    """A metric's value as a person reads it."""
    return (FORMS["eval/reward"] if _SET_REWARD.fullmatch(name) else FORMS[name]).format(value)


def set_rewards(names: Iterable[str]) -> list[tuple[str, str]]:
    """The rewards of named sets among metrics, each with its label."""
    return [(f"eval {found[1]}", name) for name in names if (found := _SET_REWARD.fullmatch(name))]


def step_line(step: int, steps: int, row: Mapping[str, float]) -> str:
    """`step 12/50  reward 0.61  kl 0.0012  ...  0.84 s (rollout 0.51, fwd+bwd 0.22)`. What is unknown is left out."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    for label, name in (
        ("reward", "reward"),
        ("eval", "eval/reward"),
        *set_rewards(row),
        ("loss", "loss/total"),
        ("kl", "policy/kl"),
        ("mismatch k3", "mismatch/k3"),
        ("routes differ", "routes/differ"),
        ("stale", "staleness/max"),
        ("failed", "rollout/failed"),
        ("skipped", "update/skipped"),
        ("checkpoints failed", "checkpoint/failed"),
        ("tok/s", "tokens_per_s"),
    ):
        value = row.get(name)
        if value is not None and not (value == 0 and name in _SHOWN_IF_ANY):
            parts.append(f"{label} {written(name, value)}")
    return "  ".join([*parts, _times(row)])


def is_step_line(line: str) -> bool:
    """Whether `step_line` made it: a live view shows the same in its own way."""
    return _STEP_LINE.match(line) is not None


def phases(row: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of each phase that a step had, in the order in which they come, by the name for a person."""
    return {_SHORT.get(p, p): seconds for p in _PHASES if (seconds := row.get(f"time/{p}_s")) is not None}


def _times(row: Mapping[str, float]) -> str:
    """The step's seconds, and the phases that took a tenth of it or more."""
    total = row["time/step_s"]
    large = [f"{phase} {seconds:.2f}" for phase, seconds in phases(row).items() if seconds >= 0.1 * total]
    return f"{total:.2f} s (" + ", ".join(large) + ")"
