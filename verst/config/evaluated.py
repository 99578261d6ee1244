"""What a run evaluates, and when: the held-out share of its data, and the named sets of `eval.sets`, as one list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verst.config.schema import Config

HELD_OUT = ""
"""The name of the held-out share among the sets."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One set of prompts that a run evaluates: how many, how often, and how they are sampled."""

    name: str
    prompts: int
    every_steps: int
    temperature: float
    samples: int = 1

    @property
    def how(self) -> str:
        """What a replica is told to do with its prompts."""
        return f"evaluation of {self.name}" if self.name else "evaluation"

    @property
    def prefix(self) -> str:
        """Of its metrics."""
        return f"eval/{self.name}/" if self.name else "eval/"

    @property
    def scored(self) -> list[str]:
        """Those of its metrics of which more is better."""
        ks = pass_ks(self.samples) if self.samples > 1 else ()
        return [f"{self.prefix}reward", *(f"{self.prefix}pass_at_{k}" for k in ks)]


def evaluated(config: Config) -> list[Evaluated]:
    """Everything that the run evaluates; empty if it evaluates nothing."""
    own = config.eval
    held_out = [Evaluated(HELD_OUT, own.prompts, own.every_steps, own.temperature)] if own.every_steps else []
    return held_out + [Evaluated(name, s.prompts, s.every_steps, s.temperature, s.samples) for name, s in own.sets.items()]


def due(config: Config, step: int) -> list[Evaluated]:
    """What is evaluated with the weights of a step: before the first, every `every_steps`, and after the last."""
    return [one for one in evaluated(config) if step % one.every_steps == 0 or step == config.run.steps]


def samples_of(config: Config, how: str) -> int:
    """Trajectories of an evaluated prompt, by what a replica is told to do with it; 0 of one that is trained on."""
    if how in ("policy", "demonstrations"):
        return 0
    return next((one.samples for one in evaluated(config) if one.how == how), 1)


def best_metrics(config: Config) -> list[str]:
    """The metrics that `checkpoint.best` may name in this run."""
    return [name for one in evaluated(config) for name in one.scored]


def measures_best(config: Config, step: int) -> bool:
    """Whether the metric that `checkpoint.best` names is measured with the weights of a step."""
    return config.checkpoint.best is not None and any(config.checkpoint.best in one.scored for one in due(config, step))


def pass_ks(samples: int) -> list[int]:
    """The k of pass@k: powers of two up to the number of samples, and that number."""
    return sorted({*(2**i for i in range(samples.bit_length())), samples})
