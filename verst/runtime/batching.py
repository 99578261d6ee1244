"""From scored groups to what a step trains on: pure functions over NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from verst.algorithms.critic import Signal, Values, explained_variance
from verst.algorithms.own import call_advantages, own_advantages
from verst.algorithms.selection import all_equal
from verst.algorithms.table import algorithm_for
from verst.config.algorithms import AlgorithmConfig
from verst.config.schema import Config
from verst.data.packing import plan_samples, samples_of_rank
from verst.errors import InvariantViolation, RoutesRefused, TrainingDiverged
from verst.fields import by_sequence, kinds_of
from verst.observe.metrics import Tally
from verst.rewards.metrics import PREFIX
from verst.rollout.transcript import Transcript
from verst.routing.records import require_routes
from verst.types import NO_VERSION, Batch, Estimates, Group, Prompt, RoutedExperts, Routes, RoutesWanted, Sample, Status, Trajectory


def unusable(group: Group, min_members: int) -> str | None:
    """Why a scored group cannot be trained, or None: its commonest failure, if too few trajectories are left for a baseline."""
    if len(group.trainable) >= min_members:
        return None
    errors = Counter(t.error or "unknown" for t in group.trajectories if t.status is Status.FAILED)
    reason, count = errors.most_common(1)[0]
    return f"{count} of {len(group.trajectories)} trajectories failed: {reason}"


def without_signal(group: Group, options: AlgorithmConfig) -> str | None:
    """Why a group that can be trained has nothing to teach, so that another is to be rolled in its place, or None."""
    return algorithm_for(options).without_signal(_rewards(group), options)


def _rewards(group: Group) -> list[float]:
    """Of the trajectories that can be trained. Demonstrations are not scored."""
    return [0.0 if t.reward is None else t.reward for t in group.trainable]


def given_up(seq: int, prompt: Prompt, size: int, reason: str) -> Group:
    """A group of which nothing came back: `size` trajectories without a token, failed for one reason."""
    nothing = Transcript().trajectory(f"{seq}/0", Status.FAILED, seed=0)
    return Group(seq, prompt, tuple(replace(nothing, id=f"{seq}/{m}", error=reason) for m in range(size)), NO_VERSION)


def refused(group: Group, kind: RoutedExperts | None) -> Group:
    """The group, where trajectories whose routes cannot be replayed have failed with the reason. `kind`: what the trainer needs, if any."""
    return group if kind is None else replace(group, trajectories=tuple(_routed(t, kind) for t in group.trajectories))


def _routed(trajectory: Trajectory, kind: RoutedExperts) -> Trajectory:
    if trajectory.status is Status.FAILED:
        return trajectory
    try:
        for one in trajectory.sequences:
            require_routes(one, kind)
    except RoutesRefused as error:
        return trajectory.failed(str(error))
    return trajectory


def assemble(step: int, groups: Sequence[Group], options: AlgorithmConfig) -> Batch:
    """One batch of the trajectories that the algorithm trains, in the order of admission, one sample for each of their sequences.

    The others, and what failed, stay in the journal. Raises `ExtensionError` if fields of different samples do not fit each other.
    """
    algorithm = algorithm_for(options)
    samples = tuple(
        sample
        for g in groups
        for rewards in [_rewards(g)]
        for i in algorithm.trained(rewards)
        for sample in _samples(g.trainable[i], g.seq, rewards[i])
    )
    kinds_of(samples)  # what does not fit is told here, once, and not by a rank
    return Batch(step, tuple(g.seq for g in groups), samples)


def _samples(trajectory: Trajectory, group: int, reward: float) -> list[Sample]:
    sequences = trajectory.sequences
    fields = by_sequence(trajectory.fields, [int(one.loss_mask_T.sum()) for one in sequences])
    return [
        Sample(
            id=trajectory.id,
            group=group,
            tokens_T=one.tokens_T,
            loss_mask_T=one.loss_mask_T,
            behaviour_logprobs_T=one.logprobs_T,
            versions_T=one.versions_T,
            reward=reward,
            routes=one.routes,
            fields=own,
            branch=branch,
        )
        for branch, (one, own) in enumerate(zip(sequences, fields, strict=True))
    ]


def require_fresh(batch: Batch, version: int, limit: int) -> None:
    """Raises `InvariantViolation` if a token that was sampled is more than `limit` versions older than `version`, which the step trains."""
    for sample in batch.samples:
        versions_T = sample.versions_T[sample.loss_mask_T]
        oldest = int(versions_T[versions_T != NO_VERSION].min(initial=version))
        if version - oldest > limit:
            raise InvariantViolation(
                f"step {batch.step} would train sample {sample.id}, whose oldest token is of version {oldest}: {version - oldest} versions "
                f"behind, where slots, window and batch allow {limit}"
            )


def routes_for(batch: Batch, wanted: RoutesWanted, config: Config) -> dict[int, Routes]:
    """What one trainer rank replays, by the index of the sample: the routes of its own samples, in its own layers."""
    whole = algorithm_for(config.algorithm).whole_groups
    plan = plan_samples(batch.samples, config.train, ranks=wanted.ranks, packed=wanted.packed, whole_groups=whole)
    own = samples_of_rank(plan, wanted.rank)
    found = {i: batch.samples[i].routes for i in own}
    layers = list(wanted.layers)
    return {i: Routes(routes.experts_TLK[:, layers], routes.digest) for i, routes in found.items() if routes is not None}


def signal(batch: Batch, config: Config, reference_kl: Mapping[int, float], values: Mapping[int, Values]) -> Signal:
    """What the tokens of a batch are trained with. `reference_kl`: see `advantages`.

    `values`: the critic's, of the loss tokens of each sample that has any, by sample index; empty without a critic.
    Raises `InvariantViolation` if there is not one for each token, `TrainingDiverged` if one is not finite.
    """
    of_samples, estimate = advantages(batch, config, reference_kl), algorithm_for(config.algorithm).token_advantages
    if estimate is None:
        return Signal(of_samples)
    known = [values.get(i, np.zeros(0, np.float32)) for i in range(len(batch.samples))]
    for sample, values_N in zip(batch.samples, known, strict=True):
        if len(values_N) != sample.loss_mask_T.sum():
            raise InvariantViolation(f"sample {sample.id}: {len(values_N)} values of the critic for {sample.loss_mask_T.sum()} loss tokens")
        if not np.isfinite(values_N).all():
            raise TrainingDiverged(
                f"step {batch.step}: a value that the critic gives sample {sample.id} is not finite, so no advantage would be: start a "
                "new run (another run.name) with a lower algorithm.critic_lr"
            )
    return estimate(of_samples, known, config.algorithm)


def advantages(batch: Batch, config: Config, reference_kl: Mapping[int, float]) -> list[float]:
    """One advantage for each sample. `reference_kl`: Σ over its loss tokens of the KL estimate, by sample index; empty without one.

    They are computed of the N trajectories, each known by its first sample; length and KL are of all its samples, which share the result.
    """
    options, trajectory_S = config.algorithm, batch.trajectories
    algorithm, own = algorithm_for(options), own_advantages(options)
    firsts = [sample for sample in batch.samples if sample.branch == 0]
    tokens_N = np.bincount(trajectory_S, [sample.loss_mask_T.sum() for sample in batch.samples], minlength=len(firsts))
    kl: dict[int, float] = {}
    for index in sorted(reference_kl):  # whichever rank told it: sums have bits that depend on their order
        trajectory = int(trajectory_S[index])
        kl[trajectory] = kl.get(trajectory, 0.0) + reference_kl[index]
    rewards_N = algorithm.shape_rewards([s.reward for s in firsts], kl, tokens_N / config.max_generated_tokens, options)
    groups_N = np.array([s.group for s in firsts])
    found_N = algorithm.advantages(rewards_N, groups_N, options) if own is None else call_advantages(own, rewards_N, groups_N, firsts)
    return found_N[trajectory_S].tolist()


def describe(groups: Sequence[Group], advantages_: Estimates, version: int) -> dict[str, float]:
    """What a batch was like: rewards, lengths, failures by reason, staleness.

    `staleness` is the version at consumption minus the oldest version in the sample; `version` is the one at consumption.
    """
    tally = Tally()
    for group in groups:
        _describe_trajectories(group, version, tally)
        rewards = [t.reward for t in group.trainable if t.reward is not None and t.oldest_version is not None]
        if rewards:  # demonstrations were not sampled, so they have no reward
            tally.mean("reward", sum(rewards), len(rewards))
            tally.mean("reward/std", float(np.std(rewards)))
            tally.mean("reward/groups_without_signal", float(all_equal(rewards)))
    each = np.concatenate([np.zeros(0), *map(np.atleast_1d, advantages_)])
    tally.mean("advantage/abs", float(np.abs(each).sum()), len(each))
    return tally.report()


def describe_values(values: Mapping[int, Values], returns: Sequence[Values]) -> Tally:
    """What the critic knew of a batch before it learned from it: nothing is told without one."""
    tally = Tally()
    if returns:
        predicted = [values.get(i, np.zeros(0, np.float32)) for i in range(len(returns))]
        tally.mean("critic/value", sum(float(own.sum(dtype=np.float64)) for own in predicted), sum(map(len, predicted)))
        share = explained_variance(predicted, returns)
        if share is not None:
            tally.mean("critic/explained_variance", share)
    return tally


def _describe_trajectories(group: Group, version: int, tally: Tally) -> None:
    for t in group.trajectories:
        for name, value in t.info.items():
            if name.startswith(PREFIX) and isinstance(value, int | float):  # its reward recorded it, and failed ones cost too
                tally.mean(name, value)
        failed = t.status is Status.FAILED
        tally.mean("rollout/failed", float(failed))
        if failed:
            continue
        tally.mean("rollout/truncated", float(t.status is Status.TRUNCATED))
        tally.mean("rollout/generated_tokens", t.generated_tokens)
        tally.mean("rollout/turns", _turns(t))
        tally.mean("rollout/branches", len(t.branches))
        if (oldest := t.oldest_version) is not None:  # a policy sampled it
            staleness = version - oldest
            tally.mean("staleness/mean", staleness)
            tally.peak("staleness/max", staleness)


def _turns(trajectory: Trajectory) -> int:
    """Of all its conversations. One that several share counts where its tokens are trained."""
    if not trajectory.branches:
        return len(trajectory.turns)
    return sum(bool(one.loss_mask_T[turn.generated : turn.end].any()) for one in trajectory.sequences for turn in one.turns)


def failures(groups: Sequence[Group]) -> Counter[str]:
    """Failed trajectories by reason (the first line, so that equal causes count together)."""
    return Counter((t.error or "unknown").splitlines()[0] for g in groups for t in g.trajectories if t.status is Status.FAILED)
