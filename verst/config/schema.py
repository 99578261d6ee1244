"""The run file. One schema, every option honoured, nothing imported but pydantic.

Each option earns its place: `tests/unit/test_config.py` counts them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Section(BaseModel):
    """A part of the run file: unknown keys are errors, values are never changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfig(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run's directory.")
    dir: str = Field(default="runs", description="Where run directories are made.")
    seed: int = Field(default=0, ge=0, description="Seeds data order, sampling and initialisation.")
    steps: PositiveInt = Field(description="Steps to train; a step consumes one batch and makes one or more optimizer updates.")
    deterministic: bool = Field(
        default=True,
        description="A sequence's bits depend only on weights, tokens and seed. Costs some speed; needed for bit-exact resume.",
    )


class ModelConfig(Section):
    path: str = Field(description="Hugging Face model directory.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the weights in engine and forward pass.")


class DataConfig(Section):
    """Where prompts come from. Exactly one of `path` and `task`, unless prompts are given from Python."""

    path: str | None = Field(default=None, description="A .jsonl or .parquet file.")
    task: str | None = Field(default=None, description="A reasoning-gym task by name.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the reasoning-gym task.")
    prompt_column: str = Field(default="prompt", description="Column with the prompt: text, or a list of {role, content}.")
    demonstration_column: str | None = Field(default=None, description="Column with the answer to imitate (sft).")
    system: str | None = Field(default=None, description="System message put before every prompt.")
    shuffle: bool = Field(default=True, description="Seeded shuffling, another order in each epoch.")
    holdout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of prompts (by hash of their text) kept for evaluation and never trained on."
    )
    max_prompt_tokens: PositiveInt = Field(default=1024, description="A longer prompt is an error that names the row.")


class RolloutConfig(Section):
    engine: Literal["hf"] = Field(default="hf", description="What generates.")
    replicas: PositiveInt = Field(default=1, description="Engine replicas.")
    environment: str = Field(default="single_turn", description="A shipped environment or `module:Class`.")
    environment_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the environment.")
    group_size: PositiveInt = Field(default=8, description="Trajectories of each prompt.")
    capacity_groups: PositiveInt | None = Field(
        default=None, description="Group slots. Default: one batch, which is synchronous training. More lets rollout run ahead."
    )
    max_new_tokens: PositiveInt = Field(default=256, description="Limit of one generation.")
    max_turns: PositiveInt = Field(default=1, description="Limit of a trajectory's turns.")
    temperature: float = Field(default=1.0, ge=0, description="0: greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability. 1: off.")
    top_k: int = Field(default=0, ge=0, description="Sample from this many most likely tokens. 0: off.")
    min_p: float = Field(
        default=0.0, ge=0, lt=1, description="Leave out tokens below this share of the likeliest one's probability. 0: off."
    )
    stop: list[str] = Field(default_factory=list, description="Stop strings; the one that matched stays in the tokens.")
    max_running: PositiveInt = Field(default=64, description="Sequences decoded at once by one hf replica.")
    deadline_s: PositiveFloat = Field(default=600.0, description="Limit of rolling one group.")


class RewardConfig(Section):
    function: str = Field(default="exact_match", description="A shipped reward or `module:function`.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the reward.")
    workers: PositiveInt = Field(default=1, description="Worker processes that score.")
    deadline_s: PositiveFloat = Field(default=30.0, description="Limit of scoring one trajectory; past it the worker is replaced.")


class GrpoConfig(Section):
    """Group Relative Policy Optimization, arXiv 2402.03300, with the options later papers published."""

    name: Literal["grpo"] = "grpo"
    normalize_std: bool = Field(
        default=True, description="Divide advantages by the group's standard deviation (off: Dr. GRPO, arXiv 2503.20783)."
    )
    clip_low: PositiveFloat = Field(default=0.2, description="The ratio is clipped below 1 - clip_low.")
    clip_high: PositiveFloat = Field(
        default=0.2, description="The ratio is clipped above 1 + clip_high (DAPO, arXiv 2503.14476, uses 0.28)."
    )
    aggregate: Literal["token_mean", "sequence_mean"] = Field(
        default="token_mean", description="Every token counts the same, or every sequence does."
    )
    kl_coefficient: float = Field(
        default=0.0, ge=0, description="Weight of the KL divergence to the reference model. 0: no reference is kept."
    )
    kl_in: Literal["loss", "reward"] = Field(default="loss", description="Add the KL term to the loss, or subtract it from the reward.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="Estimator (Schulman 2020); in the loss k1 has no gradient in expectation."
    )
    old_logprobs: Literal["trainer", "behaviour"] = Field(
        default="trainer", description="Denominator of the ratio: recomputed by the trainer before the first update, or as sampled."
    )


class SftConfig(Section):
    """Supervised fine-tuning on demonstrations."""

    name: Literal["sft"] = "sft"
    aggregate: Literal["token_mean", "sequence_mean"] = Field(
        default="token_mean", description="Every token counts the same, or every sequence does."
    )


AlgorithmConfig = Annotated[GrpoConfig | SftConfig, Field(discriminator="name")]


class TrainConfig(Section):
    backend: Literal["fsdp"] = Field(default="fsdp", description="What trains.")
    ranks: PositiveInt = Field(default=1, description="Trainer processes.")
    threads: PositiveInt = Field(
        default=1, description="CPU threads of each engine and trainer process. Their number is part of what makes bits repeat."
    )
    groups_per_step: PositiveInt = Field(default=16, description="Groups one step consumes.")
    minibatches: PositiveInt = Field(default=1, description="Optimizer updates each pass over the batch makes.")
    epochs: PositiveInt = Field(default=1, description="Passes over the batch in each step.")
    microbatch_tokens: PositiveInt = Field(default=16384, description="Limit of tokens, padding included, in one forward pass.")
    lr: PositiveFloat = Field(default=1e-6, description="Learning rate after warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Course of the learning rate, down to 0 at run.steps."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the learning rate rises from 0.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's decay of its two moments.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled decay; matrices only, not norms and biases.")
    clip_norm: PositiveFloat = Field(default=1.0, description="Limit of the gradient's global 2-norm.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, a third more time."
    )
    compile: bool = Field(default=False, description="torch.compile each layer.")
    max_skipped_updates: PositiveInt = Field(default=5, description="Non-finite updates in a row that stop the run.")
    deadline_s: PositiveFloat = Field(default=1800.0, description="Limit of one call to a trainer rank.")


class WeightsConfig(Section):
    location: str | None = Field(
        default=None, description="Directory for published weights. Default: shared memory; with several nodes a shared disk."
    )
    probe_limit: PositiveFloat = Field(default=0.1, description="Largest |trainer - engine| probe log-probability; past it the run stops.")
    deadline_s: PositiveFloat = Field(default=600.0, description="Limit of one publish.")


class CheckpointConfig(Section):
    every_steps: PositiveInt = Field(default=50, description="A checkpoint after each of so many steps, and at the end.")
    keep: PositiveInt = Field(default=2, description="Checkpoints kept.")
    export_final: bool = Field(default=True, description="Write the final model as a Hugging Face directory, RUN/final.")


class EvalConfig(Section):
    every_steps: int = Field(default=0, ge=0, description="0: no evaluation. Otherwise also before the first and after the last step.")
    prompts: PositiveInt = Field(default=64, description="Prompts of the held-out share (`data.holdout`).")
    temperature: float = Field(default=0.0, ge=0, description="0: greedy.")


class Config(Section):
    """A whole run file."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = GrpoConfig()
    train: TrainConfig = TrainConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def capacity_groups(self) -> int:
        """Group slots: as configured, or one batch (synchronous)."""
        return self.rollout.capacity_groups or self.train.groups_per_step

    @property
    def max_trajectory_tokens(self) -> int:
        """Limit of a whole trajectory: the prompt and every turn at their limits. Environment replies draw on the same allowance."""
        return self.data.max_prompt_tokens + self.rollout.max_turns * self.rollout.max_new_tokens

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self._check_groups()
        if self.data.path and self.data.task:
            raise ValueError("data.path and data.task are both set: keep one")
        if self.eval.every_steps and not self.data.holdout:
            raise ValueError("eval.every_steps needs data.holdout > 0: the prompts kept for evaluation")
        return self

    def _check_groups(self) -> None:
        if self.algorithm.name == "grpo" and self.rollout.group_size < 2:
            raise ValueError(
                "rollout.group_size is 1, but grpo's baseline is the mean of the group: every advantage would be 0. Use 2 or more"
            )
        if self.capacity_groups < self.train.groups_per_step:
            raise ValueError(
                f"rollout.capacity_groups ({self.rollout.capacity_groups}) is below train.groups_per_step ({self.train.groups_per_step}): "
                "a batch could never be filled"
            )
        if self.train.microbatch_tokens < self.max_trajectory_tokens:
            raise ValueError(
                f"train.microbatch_tokens ({self.train.microbatch_tokens}) is below the longest trajectory ({self.max_trajectory_tokens} = "
                "data.max_prompt_tokens + rollout.max_turns x rollout.max_new_tokens): one that long could not be trained"
            )
        if self.train.minibatches > self.train.groups_per_step:
            raise ValueError(f"train.minibatches ({self.train.minibatches}) is above train.groups_per_step ({self.train.groups_per_step})")
