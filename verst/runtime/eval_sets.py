"""The sets of prompts that a run evaluates as it goes, on its own engines: found before it starts, measured when they are due.

Their groups are in no journal and take no slot, so nothing of them is ever trained.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verst.algorithms.estimates import pass_shares
from verst.config.evaluated import HELD_OUT, Evaluated, due, evaluated, pass_ks
from verst.config.schema import Config, DataConfig
from verst.data.sources import Source, open_source
from verst.data.stream import distinct_prompts, eval_prompts
from verst.errors import ConfigError, DataError
from verst.observe.metrics import Tally
from verst.types import Group, Prompt, Status

CORRECT_FROM = 1.0
"""The smallest reward of a right answer, for pass@k."""

Roll = Callable[[int, Prompt, str], Awaitable[tuple[bytes, Group]]]


@dataclass(frozen=True, slots=True)
class EvalSets:
    """The prompts of each set that a run evaluates, by its name."""

    config: Config
    prompts: dict[str, list[Prompt]]

    @classmethod
    def of(cls, config: Config, training: Source) -> EvalSets:
        """`training`: the source of the run's own data, of which the held-out share is taken.

        Raises `ConfigError` or `DataError`, which name the set, if one cannot be read or has no prompt.
        """
        found = {}
        for one in evaluated(config):
            held_out = one.name == HELD_OUT
            found[one.name] = eval_prompts(training, config.data, one.prompts) if held_out else _named(config, one)
        return cls(config, found)

    def __bool__(self) -> bool:
        return bool(self.prompts)

    async def measure(self, step: int, roll: Roll) -> dict[str, float]:
        """The metrics of all sets that are due with the weights of `step`, which the engines must serve. They are rolled together."""
        wanted = due(self.config, step)
        rolled = await asyncio.gather(*(self._rolled(one, roll) for one in wanted))
        return {name: value for one, groups in zip(wanted, rolled, strict=True) for name, value in metrics_of(one, groups).items()}

    async def _rolled(self, one: Evaluated, roll: Roll) -> list[Group]:
        first = self._first(one.name)
        done = await asyncio.gather(*(roll(first - i, prompt, one.how) for i, prompt in enumerate(self.prompts[one.name])))
        return [group for _, group in done]

    def _first(self, name: str) -> int:
        """The number of a set's first group. They go down from -1; a prompt has the same, and so the same seeds, each time."""
        names = list(self.prompts)
        return -1 - sum(len(self.prompts[before]) for before in names[: names.index(name)])


def metrics_of(one: Evaluated, groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward over the prompts, the share of trajectories that failed, their tokens and, of several samples, pass@k.

    What could not be scored is unknown, not wrong: it is left out, a prompt without any from the reward, one with fewer than k from pass@k.
    """
    tally = Tally()
    scored = [[t.reward for t in group.trajectories if t.reward is not None] for group in groups]
    for rewards in filter(None, scored):
        tally.mean(f"{one.prefix}reward", sum(rewards) / len(rewards))
    for trajectory in (t for group in groups for t in group.trajectories):
        tally.mean(f"{one.prefix}failed", float(trajectory.status is Status.FAILED))
        tally.mean(f"{one.prefix}generated_tokens", trajectory.generated_tokens)
    for k in pass_ks(one.samples) if one.samples > 1 else ():
        for share in pass_shares(scored, k, CORRECT_FROM):
            tally.mean(f"{one.prefix}pass_at_{k}", share)
    return tally.report()


def _named(config: Config, one: Evaluated) -> list[Prompt]:
    chosen = config.eval.sets[one.name]
    options: dict[str, Any] = {name: getattr(chosen, name) for name in ("path", "dataset", "task", "options", "columns")}
    system = config.data.system if chosen.system is None else chosen.system
    data = DataConfig(**options, system=system, max_prompt_tokens=config.data.max_prompt_tokens)
    try:
        found, scanned = distinct_prompts(open_source(data), data, one.prompts, share=1.0)
    except (ConfigError, DataError) as error:
        raise type(error)(f"eval.sets.{one.name}: {error}") from error
    if not found:
        raise DataError(f"eval.sets.{one.name}: no prompt in {scanned} rows of its source: give at least one")
    return found
