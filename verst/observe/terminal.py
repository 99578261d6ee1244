"""What a person sees while a run goes on: one plain line for each step."""

from __future__ import annotations

from collections.abc import Mapping

_PHASES = ("rollout", "lease", "load", "forward_backward", "optimizer", "publish", "commit", "pull_wait", "evaluate", "checkpoint")
_SHOWN_IF_ANY = ("rollout/failed", "update/skipped", "checkpoint/failed")
_SHORT = {"forward_backward": "fwd+bwd", "pull_wait": "pull"}


def step_line(step: int, steps: int, row: Mapping[str, float]) -> str:
    """`step 12/50  reward 0.61  kl 0.0012  ...  0.84 s (rollout 0.51, fwd+bwd 0.22)`. What is unknown is left out."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    for label, name, form in (
        ("reward", "reward", "{:.3f}"),
        ("eval", "eval/reward", "{:.3f}"),
        ("loss", "loss/total", "{:+.4f}"),
        ("kl", "policy/kl", "{:.4f}"),
        ("mismatch k3", "mismatch/k3", "{:.1e}"),
        ("routes differ", "routes/differ", "{:.1%}"),
        ("stale", "staleness/max", "{:.0f}"),
        ("failed", "rollout/failed", "{:.1%}"),
        ("skipped", "update/skipped", "{:.0%}"),
        ("checkpoints failed", "checkpoint/failed", "{:.0f}"),
        ("tok/s", "tokens_per_s", "{:,.0f}"),
    ):
        value = row.get(name)
        if value is not None and not (value == 0 and name in _SHOWN_IF_ANY):
            parts.append(f"{label} {form.format(value)}")
    return "  ".join([*parts, _times(row)])


def _times(row: Mapping[str, float]) -> str:
    """The step's seconds, and the phases that took a tenth of it or more."""
    total = row["time/step_s"]
    large = [(p, row.get(f"time/{p}_s", 0.0)) for p in _PHASES if row.get(f"time/{p}_s", 0.0) >= 0.1 * total]
    return f"{total:.2f} s (" + ", ".join(f"{_SHORT.get(p, p)} {s:.2f}" for p, s in large) + ")"
