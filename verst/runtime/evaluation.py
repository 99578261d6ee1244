"""A model measured on sets of prompts: pass@k and mean reward, each with its confidence interval.

Uses the run's own parts in this process, without Ray: `RolloutWorker` renders, generates and scores as it does for training. A set is what
the sections `data`, `rollout` and `reward` of a run file say; of `data.holdout` only the held-out prompts are taken, else all of them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verst import secrets
from verst.algorithms.estimates import CONFIDENCE, Estimate, mean_interval, pass_shares, share_interval
from verst.config.checks import PAIR
from verst.config.evaluated import pass_ks
from verst.config.load import load_config, resolved
from verst.config.schema import Config
from verst.data.sources import open_source
from verst.data.stream import distinct_prompts
from verst.errors import ConfigError, DataError
from verst.journal.codec import decode_group
from verst.runtime.extensions import Extensions
from verst.runtime.rollout_worker import RolloutWorker
from verst.types import Group, Prompt, Status

_SET_OPTIONS = {
    "data": ("path", "dataset", "task", "options", "columns", "system", "holdout", "max_prompt_tokens"),
    "rollout": ("environment", "environment_options", "max_new_tokens", "max_turns", "stop", "max_running", "deadline_s"),
    "reward": ("function", "options", "workers", "deadline_s"),
}
"""What of a run file says how prompts are answered and scored."""

_SAMPLED_BY_COMMAND = ("rollout.temperature", "rollout.group_size", "rollout.top_p", "rollout.top_k", "rollout.min_p", "eval.temperature")
_ANY_LENGTH = 2**31 - 1  # of microbatches, which an evaluation has none of


@dataclass(frozen=True, slots=True)
class EvalSet:
    """A named set: where its prompts come from and how they are answered and scored. `extensions`: given from Python, with a run."""

    name: str
    config: Config
    extensions: Extensions

    @classmethod
    def of(cls, name: str, base: Config, overrides: Sequence[str], extensions: Extensions | None = None) -> EvalSet:
        """The set that a run's configuration describes. Raises `ConfigError` for an override that an evaluation does not read."""
        refused = [word for word in overrides if word.split("=")[0].strip() in _SAMPLED_BY_COMMAND]
        if refused:
            raise ConfigError(f"{refused[0]}: an evaluation samples by --samples and --temperature, without filters")
        given = resolved(base)
        values: dict[str, Any] = {
            section: {key: value for key, value in given.get(section, {}).items() if key in keys and value is not None}
            for section, keys in _SET_OPTIONS.items()
        }
        values["data"]["columns"] = {name: column for name, column in base.data.columns.items() if name not in {"demonstration", *PAIR}}
        values["run"] = {"steps": 1, "seed": base.run.seed, "deterministic": base.run.deterministic, "secrets": base.run.secrets}
        values["model"] = {key: value for key, value in given["model"].items() if value is not None}
        values["train"] = {"threads": base.train.threads, "microbatch_tokens": _ANY_LENGTH, "routes": "ignore"}
        return cls(name, load_config(values, overrides), extensions or Extensions())


@dataclass(frozen=True, slots=True)
class Sampled:
    """One prompt: the reward of each sample, None where generating or scoring failed."""

    prompt: str
    rewards: tuple[float | None, ...]
    generated_tokens: int
    truncated: int
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetResult:
    """What a model reached on a set.

    `pass_at`: by k. Prompts of which fewer than k samples could be scored are left out of pass@k, all without one out of `reward`; both are
    None where nothing is left. Shares are of all samples.
    """

    model: str
    name: str
    samples: int
    temperature: float
    correct_from: float
    pass_at: Mapping[int, Estimate | None]
    reward: Estimate | None
    failed: float
    truncated: float
    generated_tokens: float
    rows: tuple[Sampled, ...]

    def described(self) -> dict[str, Any]:
        """As JSON values, the method with them."""
        values = asdict(self)
        values["pass_at"] = {str(k): estimate for k, estimate in values["pass_at"].items()}
        values["method"] = {
            "pass@k": "unbiased estimator, Chen et al. 2021 (arXiv 2107.03374), mean over prompts",
            "interval of pass@k": f"Wilson's score, {CONFIDENCE:.0%}, for the effective number of prompts",
            "interval of reward": f"normal, {CONFIDENCE:.0%}, standard error over prompts",
        }
        return _finite(values)


@dataclass(frozen=True, slots=True)
class EvalSampling:
    """How a set is sampled: up to `prompts` of it, `samples` answers to each, right from reward `correct_from` on.

    `ks`: those of pass@k; None: powers of two up to the number of samples, and that number.
    """

    prompts: int = 64
    samples: int = 8
    temperature: float = 1.0
    correct_from: float = 1.0
    ks: Sequence[int] | None = None

    @property
    def all_ks(self) -> Sequence[int]:
        """Raises `ConfigError` for numbers out of range, and if greedy samples are asked for, which would all be the same."""
        if self.samples < 1 or self.prompts < 1:
            raise ConfigError(f"--samples {self.samples} and --prompts {self.prompts}: both must be 1 or more")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"--temperature {self.temperature:g}: give a number from 0 (greedy) to 100")
        if not math.isfinite(self.correct_from):
            raise ConfigError(f"--correct {self.correct_from:g}: give the smallest reward of a right answer, a finite number")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(f"--temperature 0 is greedy: the {self.samples} samples of a prompt would be the same. Use --samples 1")
        if self.ks is None:
            return pass_ks(self.samples)
        if max(self.ks) > self.samples or min(self.ks) < 1:
            raise ConfigError(f"--k {','.join(map(str, self.ks))}: pass@k needs k from 1 to --samples ({self.samples})")
        return self.ks


async def evaluate(
    model: str | Path, chosen: EvalSet, sampling: EvalSampling, *, device: str, logs: Path, echo: Callable[[str], None]
) -> SetResult:
    """Generates answers with the model in a directory, on one device, and scores them.

    `logs` is a directory for what rewards print. `echo` is told how far it is.

    Raises:
        ConfigError: `sampling` contradicts itself.
        DataError: the set has no prompt.
        VerstError: model, reward or environment cannot be loaded, or a variable of `run.secrets` is not set.
    """
    ks = sampling.all_ks
    secrets.give(chosen.config.run.secrets)
    with secrets.lent():
        taken = _prompts(chosen, sampling.prompts)
    config = _with_model(chosen.config, model, sampling.temperature, len(taken))
    worker = RolloutWorker(config, chosen.extensions, 0, device, logs, samples=sampling.samples)
    try:
        await worker.start(True)
        groups = await _roll_all(worker, taken, echo)
    finally:
        await worker.close()
    return _result(str(model), chosen.name, groups, sampling, ks)


def _with_model(config: Config, model: str | Path, temperature: float, prompts: int) -> Config:
    """`prompts`: so many are evaluated at once, which limits are reckoned with."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(model)}),
            "eval": config.eval.model_copy(update={"temperature": temperature, "prompts": prompts, "every_steps": 1}),
        }
    )


def _prompts(chosen: EvalSet, count: int) -> list[Prompt]:
    data = chosen.config.data
    source = open_source(data, chosen.extensions.rows)
    found, scanned = distinct_prompts(source, data, count, share=data.holdout or 1.0)
    if not found:
        raise DataError(f"set {chosen.name}: no prompt in {scanned} rows of {source.name} (data.holdout {data.holdout})")
    return found


async def _roll_all(worker: RolloutWorker, prompts: Sequence[Prompt], echo: Callable[[str], None]) -> list[Group]:
    done = 0

    async def roll(seq: int, prompt: Prompt) -> Group:
        nonlocal done
        group = decode_group(await worker.roll(seq, prompt, "evaluation"))
        done += 1
        if done * 4 // len(prompts) > (done - 1) * 4 // len(prompts):
            echo(f"{done} of {len(prompts)} prompts")
        return group

    try:
        async with asyncio.TaskGroup() as tasks:
            rolling = [tasks.create_task(roll(seq, prompt)) for seq, prompt in enumerate(prompts)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in rolling]


def _result(model: str, name: str, groups: Sequence[Group], sampling: EvalSampling, ks: Sequence[int]) -> SetResult:
    rows = tuple(_sampled(group) for group in groups)
    scored = [[reward for reward in row.rewards if reward is not None] for row in rows]
    count = sum(len(row.rewards) for row in rows)
    pass_at: dict[int, Estimate | None] = {}
    for k in ks:
        shares = pass_shares(scored, k, sampling.correct_from)
        pass_at[k] = share_interval(shares) if shares else None
    means = [sum(known) / len(known) for known in scored if known]
    return SetResult(
        model=model,
        name=name,
        samples=sampling.samples,
        temperature=sampling.temperature,
        correct_from=sampling.correct_from,
        pass_at=pass_at,
        reward=mean_interval(means) if means else None,
        failed=1 - sum(map(len, scored)) / count,
        truncated=sum(row.truncated for row in rows) / count,
        generated_tokens=sum(row.generated_tokens for row in rows) / count,
        rows=rows,
    )


def _sampled(group: Group) -> Sampled:
    members = group.trajectories
    return Sampled(
        group.prompt.id,
        tuple(t.reward for t in members),
        sum(t.generated_tokens for t in members),
        sum(t.status is Status.TRUNCATED for t in members),
        tuple(dict.fromkeys(t.error for t in members if t.error is not None)),
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity: an interval without ends has null in their place."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
