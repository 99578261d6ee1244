"""What is done about a mismatch of engine and trainer as it is measured: a line for a person, or the end of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from verst.errors import TrainingDiverged

_BY_AGE = ("mismatch/k3", "mismatch/age_1/k3", "mismatch/age_2/k3", "mismatch/age_3/k3", "mismatch/older/k3")
"""From the newest tokens on: the older a token, the more of its divergence is the policy's progress, not the engine's error."""
_DISAGREE = "engine and trainer disagree about the tokens that are trained"
_MOVED = "the policy has moved that far from the versions that sampled these tokens, or engine and trainer disagree"


class FidelityWatch:
    """Looks at each step's KL divergence (k3) between engine and trainer, over the newest tokens that the step has.

    `unreplayed`: the setting of `train.routes`, where a model's routes could be replayed and are not.
    """

    def __init__(self, limit: float, action: Literal["warn", "stop"], unreplayed: str | None = None) -> None:
        self._limit = limit
        self._action = action
        self._unreplayed = unreplayed
        self._told = 0.0  # the largest divergence that was warned of

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Lines for the person who watches. A warning comes once, and again each time the divergence has doubled since.

        Raises `TrainingDiverged` past the limit, if that is to stop the run.
        """
        measured = next((name for name in _BY_AGE if name in metrics), None)
        if measured is None:
            return []  # nothing that was sampled
        lines = [*self._routes(step, measured, metrics[measured])]
        value = math.inf if math.isnan(metrics[measured]) else metrics[measured]
        if value <= max(self._limit, 2 * self._told):
            return lines
        found = f"{measured} of step {step} is {metrics[measured]:.2e} nats a token, above fidelity.limit ({self._limit:g})"
        cause = _DISAGREE if measured == _BY_AGE[0] else _MOVED
        if self._action == "stop":
            raise TrainingDiverged(
                f"{found}: {cause}. None of its updates was made, and step {step - 1} is "
                "the last commit. docs/fidelity.md lists causes; to go on as it is: verst resume RUN with fidelity.action=warn, or with a "
                "higher fidelity.limit"
            )
        self._told = value
        return [*lines, f"warning: {found}: {cause}; docs/fidelity.md lists causes"]

    def _routes(self, step: int, measured: str, value: float) -> list[str]:
        if self._unreplayed is None:
            return []
        setting, self._unreplayed = self._unreplayed, None
        return [
            f"warning: train.routes is {setting}, so tokens are not trained on the experts that they were sampled with: "
            f"{measured} of step {step} is {value:.2e} nats a token, of which train.routes=replay would take the routing's part away"
        ]
