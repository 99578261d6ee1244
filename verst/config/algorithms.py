"""The `algorithm` sections of a run file. A name is a preset: it sets the defaults of a paper, and each may be overridden.

What else makes algorithms differ (how a reward becomes an advantage, at which level the ratio is taken) is no option: the name says it,
and `verst.algorithms.table` does it. Descriptions belong to the types, so that a preset repeats none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

from verst.config.values import Positive, Real, Section, Text, Whole

_NAMED = ConfigDict(json_schema_extra={"required": ["name"]})
"""The name decides which options there are, so a section without it is refused. pydantic's JSON schema does not say so."""


class CorrectionConfig(Section):
    """One factor of the weight that a token's loss gets for having been drawn from the engine's distribution; see `docs/fidelity.md`."""

    kind: Literal["truncate", "mask", "reject"] = Field(
        description="Weigh by the ratio up to `upper`; weigh by it between the bounds and by 0 outside; or only drop samples outside."
    )
    level: Literal["token", "geometric", "sequence"] = Field(
        description="The ratio of each token, its mean over the sample, or the product. With reject and token: every one has to be inside."
    )
    lower: Real = Field(default=0.0, description="Smallest ratio of trainer over behaviour probability.")
    upper: Positive | None = Field(default=None, description="Largest ratio. Default: none (reject only).")


Aggregate = Annotated[
    Literal["token_mean", "sequence_mean", "constant"],
    Field(
        description="Every token counts the same, or every trajectory does; or the divisor is the number of trajectories times the most "
        "tokens that one may generate (Dr. GRPO, arXiv 2503.20783)."
    ),
]
ClipLow = Annotated[Positive, Field(le=1, description="The ratio is clipped below 1 - clip_low. 1: it has no lower bound.")]
ClipHigh = Annotated[Positive, Field(description="The ratio is clipped above 1 + clip_high.")]
NormalizeStd = Annotated[bool, Field(description="Divide advantages by the group's standard deviation.")]
DynamicSampling = Annotated[
    bool,
    Field(description="Drop groups whose rewards are all equal, which have no gradient, and roll others instead (DAPO, arXiv 2503.14476)."),
]
OverlongShare = Annotated[
    Real,
    Field(
        lt=1,
        description="Share of the most tokens that a trajectory may generate, at the end, over which the reward falls by up to 1 (DAPO, "
        "arXiv 2503.14476, eq. 13). 0: off.",
    ),
]
KlIn = Annotated[Literal["loss", "reward"], Field(description="Add the KL term to the loss, or subtract it from the reward.")]
KlEstimator = Annotated[
    Literal["k1", "k2", "k3"], Field(description="Estimator (Schulman 2020); in the loss k1 has no gradient in expectation.")
]


class RatioConfig(Section):
    """What all algorithms have whose loss knows which policy sampled a token."""

    model_config = _NAMED
    name: Any  # first of the options; each preset narrows it to its own
    aggregate: Aggregate = "token_mean"
    old_logprobs: Literal["trainer", "behaviour"] = Field(
        default="trainer", description="Denominator of the ratio: recomputed by the trainer before the first update, or as sampled."
    )
    corrections: list[CorrectionConfig] = Field(
        default_factory=list,
        description="Importance weights of trainer over behaviour probabilities: {kind, level, lower, upper} each; see docs/fidelity.md.",
    )


class PolicyGradientConfig(RatioConfig):
    """What all algorithms have that raise the probability of what earned more than a baseline."""

    kl_coefficient: Real = Field(default=0.0, description="Weight of the KL divergence to the reference model. 0: no reference is kept.")
    kl_in: KlIn = "loss"
    kl_estimator: KlEstimator = "k3"
    overlong_share: OverlongShare = 0.0
    loss: Text | None = Field(default=None, description="`module:function(inputs)` in place of the algorithm's own loss.")


class SampleAdvantageConfig(PolicyGradientConfig):
    """Whose advantages are of samples, and can be a user's own."""

    advantages: Text | None = Field(
        default=None, description="`module:function(rewards_N, groups_N, samples)` in place of the algorithm's own advantages."
    )


class ClippedConfig(PolicyGradientConfig):
    """With bounds of the ratio."""

    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2


class ComparingConfig(SampleAdvantageConfig):
    """Whose baseline is of the group: one of equal rewards has no gradient."""

    dynamic_sampling: DynamicSampling = False


class GroupRelativeConfig(ComparingConfig, ClippedConfig):
    """GRPO and what was made of it: advantages are rewards less the group's mean."""

    normalize_std: NormalizeStd = True


class GrpoConfig(GroupRelativeConfig):
    """Group Relative Policy Optimization, arXiv 2402.03300."""

    name: Literal["grpo"] = "grpo"


class DrGrpoConfig(GroupRelativeConfig):
    """GRPO without its two biases, Dr. GRPO, arXiv 2503.20783."""

    name: Literal["dr_grpo"] = "dr_grpo"
    aggregate: Aggregate = "constant"
    normalize_std: NormalizeStd = False


class DapoConfig(GroupRelativeConfig):
    """Decoupled Clip and Dynamic Sampling Policy Optimization, arXiv 2503.14476."""

    name: Literal["dapo"] = "dapo"
    clip_high: ClipHigh = 0.28
    dynamic_sampling: DynamicSampling = True
    overlong_share: OverlongShare = 0.2


class GspoConfig(GroupRelativeConfig):
    """Group Sequence Policy Optimization, arXiv 2507.18071: one ratio for each sequence."""

    name: Literal["gspo"] = "gspo"
    aggregate: Aggregate = "sequence_mean"
    clip_low: ClipLow = 3e-4
    clip_high: ClipHigh = 4e-4


class CispoConfig(GroupRelativeConfig):
    """Clipped importance weights that cut no token's gradient off: MiniMax-M1, arXiv 2506.13585."""

    name: Literal["cispo"] = "cispo"
    clip_low: ClipLow = 1.0
    clip_high: ClipHigh = 4.0


class RlooConfig(ComparingConfig):
    """REINFORCE Leave-One-Out, arXiv 2402.14740: the baseline is the mean reward of the others, and nothing is clipped."""

    name: Literal["rloo"] = "rloo"
    aggregate: Aggregate = "constant"
    kl_in: KlIn = "reward"
    kl_estimator: KlEstimator = "k1"


class ReinforcePlusPlusConfig(SampleAdvantageConfig, ClippedConfig):
    """REINFORCE++, arXiv 2501.03262: advantages are rewards normalised over the whole batch."""

    name: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    kl_in: KlIn = "reward"
    kl_estimator: KlEstimator = "k1"


class ReinforcePlusPlusBaselineConfig(ComparingConfig, ClippedConfig):
    """REINFORCE++ with baseline, arXiv 2501.03262: rewards less the group's mean, normalised over the whole batch."""

    name: Literal["reinforce_plus_plus_baseline"] = "reinforce_plus_plus_baseline"
    kl_estimator: KlEstimator = "k2"


class PpoConfig(ClippedConfig):
    """Proximal Policy Optimization, arXiv 1707.06347, with a learned critic and generalized advantage estimation, arXiv 1506.02438."""

    name: Literal["ppo"] = "ppo"
    kl_in: KlIn = "reward"
    kl_estimator: KlEstimator = "k1"
    gamma: Positive = Field(default=1.0, le=1, description="Discount of a reward for each generated token that it is ahead.")
    gae_lambda: Real = Field(
        default=0.95,
        le=1,
        description="Advantages trust the critic's next value (0: more bias) or the reward that came in the end (1: more variance).",
    )
    normalize_advantages: bool = Field(
        default=True, description="Advantages less the mean of all tokens of the batch, over their standard deviation."
    )
    value_clip: Real = Field(
        default=0.2,
        description="In units of the reward: no gradient for a value that has moved further than this towards its return. 0: always.",
    )
    critic_path: Text | None = Field(
        default=None,
        description="Directory of the model that the critic begins from, such as a reward model, whose head is taken too. "
        "Default: model.path, with a head of zeros.",
    )
    critic_lr: Positive | None = Field(default=None, description="Peak learning rate of the critic. Default: train.lr.")
    critic_warmup_steps: Whole = Field(default=0, description="First steps, which train the critic alone.")


class DistillConfig(RatioConfig):
    """On-policy distillation, arXiv 2306.13649: the policy's own answers, and what a teacher thinks of each of their tokens."""

    model_config = ConfigDict(json_schema_extra={"required": ["name", "teacher"]})
    name: Literal["distill"] = "distill"
    teacher: Text = Field(description="The teacher, as `model.path`: a directory or a hub id. Its tokenizer must have the policy's tokens.")


class BestOfNConfig(Section):
    """Rejection sampling: imitates the best of the policy's own answers to each prompt (RAFT, arXiv 2304.06767)."""

    model_config = _NAMED
    name: Literal["best_of_n"] = "best_of_n"
    aggregate: Aggregate = "token_mean"
    reward_above: Real = Field(
        default=0.0, description="A group whose best reward is not above this has no answer to imitate: it is dropped, and another rolled."
    )


class OfflineConfig(Section):
    """What learns from the data alone: nothing is rolled out to be trained."""

    model_config = _NAMED
    name: Any


class SftConfig(OfflineConfig):
    """Supervised fine-tuning on demonstrations."""

    name: Literal["sft"] = "sft"
    aggregate: Aggregate = "token_mean"


class PreferenceConfig(Section):
    """What learns which of two answers is the better one."""

    model_config = _NAMED
    aggregate: ClassVar[Literal["sequence_mean"]] = "sequence_mean"  # each token has its pair's loss, so this is the mean over pairs
    name: Any
    beta: Positive = Field(
        default=0.1, description="Weight of the divergence from the initial model that the implicit reward is of: a large one holds closer."
    )


class DpoConfig(PreferenceConfig, OfflineConfig):
    """Direct Preference Optimization on the pairs of a data set, arXiv 2305.18290."""

    name: Literal["dpo"] = "dpo"


class OnlineDpoConfig(PreferenceConfig):
    """Direct Preference Optimization on the policy's own answers: the best and the worst of each group (arXiv 2402.04792)."""

    name: Literal["online_dpo"] = "online_dpo"


AlgorithmConfig = Annotated[
    GrpoConfig
    | DrGrpoConfig
    | DapoConfig
    | GspoConfig
    | CispoConfig
    | RlooConfig
    | ReinforcePlusPlusConfig
    | ReinforcePlusPlusBaselineConfig
    | PpoConfig
    | DistillConfig
    | BestOfNConfig
    | OnlineDpoConfig
    | DpoConfig
    | SftConfig,
    Field(discriminator="name"),
]

PRESETS: Mapping[str, type[Section]] = {preset.model_fields["name"].default: preset for preset in get_args(get_args(AlgorithmConfig)[0])}
"""By name."""
