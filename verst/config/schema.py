"""The run file. One schema, every option honoured, nothing imported but pydantic.

Each option earns its place: `tests/unit/test_config.py` counts them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from verst.config import checks
from verst.config.algorithms import AlgorithmConfig, GrpoConfig
from verst.config.values import Count, Number, Options, Positive, Real, Seconds, Section, Temperature, Text, Whole


def _not_partial(name: str) -> str:
    if name.endswith(".partial"):
        raise ValueError("names that end in .partial are those of directories still being made")
    return name


def _set_name(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ValueError("a set's name may have up to 64 letters, digits, '_' and '-', and begins with a letter or a digit")
    return name


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name is there twice: remove one")
    return names


class ChangeConfig(Section):
    """Options that have another value from a step on."""

    step: Annotated[Count, Field(ge=2)] = Field(description="The first step that is made with them.")
    options: Annotated[Options, Field(min_length=1)] = Field(
        description="Their new values by dotted name: {train.lr: 1e-6, algorithm.clip_high: 0.3}."
    )


class RunConfig(Section):
    name: Annotated[str, AfterValidator(_not_partial)] = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="Name of the run's directory."
    )
    dir: Text = Field(default="runs", description="Where run directories are made.")
    seed: Whole = Field(default=0, description="Seeds the order of the data and the sampling of tokens.")
    steps: Count = Field(description="Steps to train; a step consumes one batch and makes one or more optimizer updates.")
    changes: list[ChangeConfig] = Field(
        default_factory=list, description="Options that have another value from a step on: {step, options} each; see docs/algorithms.md."
    )
    deterministic: bool = Field(
        default=True,
        description="A sequence's bits depend only on weights, tokens and seed. Costs some speed; needed for bit-exact resume.",
    )
    secrets: list[Text] = Field(
        default_factory=list,
        description="Names of environment variables that user code sees though they speak of a secret.",
    )


class ModelConfig(Section):
    path: Text = Field(description="Hugging Face model directory, or a model of the hub: org/name or org/name@revision.")
    spec: Text | None = Field(
        default=None,
        description="`module:object`: how to build a model that transformers does not know, and its names (docs/extending.md).",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the weights in engine and forward pass.")


class PromptSource(Section):
    """What prompts are read from."""

    path: Text | None = Field(default=None, description="A .jsonl or .parquet file.")
    dataset: Text | None = Field(
        default=None, description="What the library datasets loads: a name on the hub, a directory of data files, or one that it saved."
    )
    task: Text | None = Field(default=None, description="A reasoning-gym task by name.")
    options: Options = Field(
        default_factory=dict, description="Options of the reasoning-gym task, or of datasets.load_dataset: name, split (default: train) …"
    )
    columns: dict[Text, Text] = Field(
        default_factory=dict,
        description="Columns that have other names: {prompt: question, demonstration: solution, answer: final}. A prompt is text or a list "
        "of {role, content}, a demonstration the answer to imitate (sft), chosen and rejected the better and the worse one (dpo), all else "
        "fields that rewards and environments see. Without a prompt, messages is a whole conversation, cut before its first answer.",
    )
    system: str | None = Field(default=None, description="System message put before every prompt.")


class CurriculumConfig(Section):
    """Easy prompts first: a row that is too difficult yet is passed over, and comes again in the next epoch; see `docs/data.md`."""

    field: Text = Field(description="The field that says how difficult a prompt is: a number, larger for harder ones.")
    start: Number = Field(description="The most difficult that the first prompt may be.")
    end: Number = Field(description="The most difficult from `prompts` on. Rows beyond it are never used.")
    prompts: Count = Field(description="Over how many prompts the limit goes from `start` to `end`, in equal parts.")


class DataConfig(PromptSource):
    """Where prompts come from. Exactly one of `path`, `dataset` and `task`, unless prompts are given from Python."""

    shuffle: bool = Field(
        default=True, description="Seeded shuffling, another order in each epoch. Iterators given from Python keep their own order."
    )
    holdout: Real = Field(
        default=0.0, lt=1, description="Share of prompts (by hash of their text) kept for evaluation and never trained on."
    )
    curriculum: CurriculumConfig | None = Field(
        default=None, description="Easy prompts first: {field, start, end, prompts}. Default: difficulty plays no part."
    )
    max_prompt_tokens: Count = Field(default=1024, description="A longer prompt is an error that names the row.")


class RolloutConfig(Section):
    engine: Literal["hf", "sglang"] = Field(default="hf", description="What generates: in the replica's own process, or an SGLang server.")
    sglang: Options = Field(default_factory=dict, description="SGLang's own server arguments, by the names of its command line.")
    urls: list[Text] = Field(
        default_factory=list, description="SGLang servers that run already, one for each replica. Default: start them."
    )
    replicas: Count = Field(default=1, description="Engine replicas.")
    environment: Text = Field(
        default="single_turn",
        description="A shipped environment, `module:Class`, or a function that asks for completions: in messages `agent:module:function`, "
        "in tokens `rollout:module:function`, or as slime's generate functions do, `slime:module:function`.",
    )
    environment_options: Options = Field(default_factory=dict, description="Keyword arguments of the environment.")
    group_size: Count = Field(default=8, description="Trajectories of each prompt; those of one group share its baseline.")
    oversample: Whole = Field(
        default=0,
        description="Trajectories of each prompt beyond group_size: once group_size have ended, the others are cut. Favours short answers; "
        "bias/length shows how much.",
    )
    capacity_groups: Count | None = Field(
        default=None, description="Group slots. Default: one batch, which is synchronous training. More lets rollout run ahead."
    )
    window_groups: Count = Field(
        default=1,
        description="The next group to train is the oldest finished one among so many from the oldest on. 1: strictly in the order of "
        "admission; more spares the trainer waiting for long answers, and favours short ones by that much. Needs a larger capacity_groups.",
    )
    max_new_tokens: Count = Field(
        default=256, description="Limit of one generation; for sft and dpo, of an answer whose prompt is at its limit."
    )
    max_turns: Count = Field(default=1, description="Limit of a trajectory's turns.")
    temperature: Temperature = Field(
        default=1.0, description="Divides the logits, in sampling and in the trainer's log-probabilities alike. Training only."
    )
    top_p: Positive = Field(
        default=1.0, le=1, description="Sample from the smallest set of tokens with this probability. 1: off. Training only."
    )
    top_k: Whole = Field(default=0, description="Sample from this many most likely tokens. 0: off. Training only.")
    min_p: Real = Field(
        default=0.0, lt=1, description="Leave out tokens below this share of the likeliest one's probability. 0: off. Training only."
    )
    stop: list[Text] = Field(default_factory=list, description="Stop strings; the one that matched stays in the tokens.")
    max_running: Count = Field(default=64, description="Sequences decoded at once by one replica.")
    deadline_s: Seconds = Field(
        default=600.0,
        description="Limit of rolling one group once the engine has room for it, past which its unfinished trajectories have failed; and "
        "of each call of an environment.",
    )


class RewardConfig(Section):
    function: Text = Field(default="exact_match", description="A shipped reward or `module:function`.")
    options: Options = Field(default_factory=dict, description="Keyword arguments of the reward.")
    workers: Count = Field(
        default=1,
        description="Worker processes that score, for each replica: one trajectory at a time each, or up to 64 if the reward is async.",
    )
    deadline_s: Seconds = Field(
        default=30.0,
        description="Limit of scoring one trajectory, or one group if the reward scores groups; past it the worker is replaced.",
    )
    actor_gpus: Annotated[float, Field(ge=0, le=8)] | None = Field(
        default=None,
        description="Scores in one actor of Ray for the whole run, with so many GPUs (0: none), whose workers these are then. "
        "None: workers beside each replica, without a GPU.",
    )


class FiltersConfig(Section):
    """Which finished groups, or trajectories of them, are not trained; see `docs/extending.md`."""

    functions: dict[Text, Options] = Field(
        default_factory=dict,
        description="Filters and their keyword arguments, asked in this order: {length: {max_tokens: 200}, my_module:my_filter: {}}. "
        "Shipped: duplicates, length.",
    )
    deadline_s: Seconds = Field(
        default=10.0, description="Limit of asking one filter about one group; past it the group is dropped and the filter started anew."
    )


class TrainConfig(Section):
    backend: Literal["fsdp", "megatron"] = Field(default="fsdp", description="What trains.")
    megatron: Options = Field(default_factory=dict, description="Megatron-Core's own arguments, by the names of its command line.")
    ranks: Count = Field(default=1, description="Trainer processes.")
    threads: Count = Field(
        default=1, description="CPU threads of each engine and trainer process. Their number is part of what makes bits repeat."
    )
    groups_per_step: Count = Field(default=16, description="Groups one step consumes.")
    minibatches: Count = Field(default=1, description="Optimizer updates each pass over the batch makes.")
    epochs: Count = Field(default=1, description="Passes over the batch in each step.")
    microbatch_tokens: Count = Field(default=16384, description="Limit of tokens, padding included, in one forward pass.")
    lr: Positive = Field(default=1e-6, le=1, description="Learning rate after warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Course of the learning rate, down to 0 at run.steps."
    )
    warmup_steps: Whole = Field(default=0, description="Steps over which the learning rate rises, in equal parts, to train.lr.")
    betas: tuple[Annotated[Real, Field(lt=1)], Annotated[Real, Field(lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW's decay of its two moments."
    )
    weight_decay: Real = Field(default=0.0, le=100, description="AdamW's decoupled decay; matrices only, not norms and biases.")
    clip_norm: Positive = Field(default=1.0, description="Limit of the gradient's global 2-norm.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, a third more time."
    )
    compile: bool = Field(default=False, description="torch.compile each layer.")
    routes: Literal["replay", "record", "ignore"] = Field(
        default="replay",
        description="Mixture-of-Experts models: train each token on the experts it was sampled with (R3, arXiv 2510.11370), only record "
        "them and measure how many the trainer would have chosen otherwise, or neither.",
    )
    max_skipped_updates: Count = Field(default=5, description="Non-finite updates in a row that stop the run.")
    deadline_s: Seconds = Field(
        default=1800.0, description="Limit of one call to a trainer rank, of its collectives, and of the start of any process."
    )


class WeightsConfig(Section):
    transport: Literal["file", "group", "shared"] | None = Field(
        default=None,
        description="How weights reach the engines: a file that they map, a broadcast to a process group (gloo, NCCL), or buffers shared "
        "by processes on one device. Default: group where trainer and replicas have GPUs of their own, shared on one GPU, file on CPUs.",
    )
    location: Text | None = Field(
        default=None, description="Directory for published weights. Default: shared memory. Several nodes need one on a shared disk."
    )
    in_flight: Literal["keep", "recompute", "finish"] = Field(
        default="keep",
        description="What a new version does to generation in flight: it goes on at once with the keys and values it has, or with new ones "
        "computed from its tokens, or the version waits until it has finished. Engines that share the trainer's GPUs always recompute.",
    )
    probe_limit: Positive | None = Field(
        default=None,
        description="Largest mean |trainer - engine| of the probe's log-probabilities; past it the run stops. "
        "Default: 0.01 in float32, 0.5 in bfloat16.",
    )
    deadline_s: Seconds = Field(
        default=600.0, description="Limit of bringing a published version into an engine, its repetition and probe included."
    )


class FidelityConfig(Section):
    """What happens where trainer and engines disagree about the tokens that are trained; see `docs/fidelity.md`."""

    limit: Positive = Field(
        default=0.01, description="Largest KL divergence (k3, nats a token) between engine and trainer, of each step's newest tokens."
    )
    action: Literal["warn", "stop"] = Field(default="warn", description="Past the limit: tell it, or stop before the step's first update.")


class CheckpointConfig(Section):
    every_steps: Count = Field(default=50, description="A checkpoint after each of so many steps, and at the end.")
    keep: Count = Field(default=2, description="Checkpoints kept, the newest; that of `best` is kept besides.")
    best: Text | None = Field(
        default=None,
        description="A metric of an evaluation, such as eval/reward or eval/NAME/reward: of the steps it is measured at, which get a "
        "checkpoint each, that of its largest value is kept, and RUN/best.json names it (docs/evaluation.md).",
    )
    snapshots: bool = Field(
        default=True,
        description="Keep the trainer's newest two states in memory, taken as often as 3 % of the time allows, for ranks that are lost.",
    )
    journal_limit_bytes: Count | None = Field(
        default=None,
        description="Above this size of the journal, trajectories that no checkpoint needs are given up, oldest first. null: all are kept.",
    )
    export_final: bool = Field(default=True, description="Write the final model as a Hugging Face directory, RUN/final.")


class EvalSetConfig(PromptSource):
    """A set of prompts with a name, which its metrics carry: `eval/NAME/reward`. Exactly one of `path`, `dataset` and `task`. Answers are
    generated and scored as `rollout` and `reward` say, within `data.max_prompt_tokens`.
    """

    system: str | None = Field(default=None, description="System message put before every prompt. Default: `data.system`.")
    prompts: Count = Field(default=64, description="At most so many prompts, in the source's own order, each text once.")
    every_steps: Count = Field(description="How often it is evaluated; also before the first and after the last step.")
    temperature: Temperature = Field(default=0.0, description="0: greedy. Evaluation samples without filters.")
    samples: Count = Field(default=1, description="Answers to each prompt. With several, pass@k is measured; they need a temperature.")


class EvalConfig(Section):
    every_steps: Whole = Field(
        default=0, description="0: no evaluation of the held-out share. Otherwise also before the first and after the last step."
    )
    prompts: Count = Field(default=64, description="Prompts of the held-out share (`data.holdout`), one trajectory each.")
    temperature: Temperature = Field(default=0.0, description="0: greedy. Evaluation samples without filters.")
    sets: dict[Annotated[str, AfterValidator(_set_name)], EvalSetConfig] = Field(
        default_factory=dict,
        description="Further sets by name, each evaluated on its own: {NAME: {path: FILE, every_steps: 20}} (docs/evaluation.md).",
    )


class HooksConfig(Section):
    """Code of the run's owner that sees each step; see `docs/extending.md`."""

    classes: dict[Text, Options] = Field(
        default_factory=dict, description="Training hooks and their keyword arguments: {my_module:MyHook: {window: 10}}."
    )
    deadline_s: Seconds = Field(default=10.0, description="Limit of one call; past it the hook is given up until the run is started again.")
    required: bool = Field(default=False, description="A hook that fails ends the run. Otherwise it is a warning.")


class TrackingConfig(Section):
    """Where metrics and samples go beside the run's own directory; see `docs/watching.md`. Keys come from the environment only."""

    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], AfterValidator(_each_once)] = Field(
        default=["tensorboard"],
        json_schema_extra={"uniqueItems": True},
        description="Those that get every step's metrics. None of them can end or slow the run.",
    )
    project: Text = Field(default="verst", description="Under which wandb, MLflow and trackio file the run.")
    samples_every_steps: Whole = Field(
        default=10,
        description="A table of prompts, completions and rewards for the trackers, of the first step and each of so many. 0: none.",
    )
    prometheus_port: Literal["auto"] | Annotated[Whole, Field(le=65535)] = Field(
        default=0, description="Serve metrics to Prometheus from the loop's process. auto: the system chooses the port. 0: off."
    )
    prometheus_host: Text = Field(default="127.0.0.1", description="The address to serve them on; 0.0.0.0 is all of the machine's.")


class Config(Section):
    """A whole run file."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    filters: FiltersConfig = FiltersConfig()
    algorithm: AlgorithmConfig = GrpoConfig()
    train: TrainConfig = TrainConfig()
    weights: WeightsConfig = WeightsConfig()
    fidelity: FidelityConfig = FidelityConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    hooks: HooksConfig = HooksConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def capacity_groups(self) -> int:
        """Group slots: as configured, or one batch (synchronous)."""
        return self.rollout.capacity_groups or self.train.groups_per_step

    @property
    def rolled_per_group(self) -> int:
        """Trajectories that are rolled for each prompt, those that will be cut included."""
        return self.rollout.group_size + self.rollout.oversample

    @property
    def worst_staleness(self) -> int:
        """The most versions that a trained token can be behind: ⌊(C + W − 2) / P⌋ for C slots, a window of W groups and P groups a step.

        With C = P every step takes all slots, so it is 0. `docs/staleness.md` has the proof.
        """
        capacity, batch = self.capacity_groups, self.train.groups_per_step
        return (capacity + self.rollout.window_groups - 2) // batch if capacity > batch else 0

    @property
    def probe_limit(self) -> float:
        """As configured, or far above what rounding alone does to tokens that the policy finds unlikely, as those of a prompt are."""
        return self.weights.probe_limit or (0.01 if self.model.dtype == "float32" else 0.5)

    @property
    def max_trajectory_tokens(self) -> int:
        """Limit of a whole trajectory: the prompt and every turn at their limits. Environment replies draw on the same allowance."""
        return self.data.max_prompt_tokens + self.max_generated_tokens

    @property
    def max_generated_tokens(self) -> int:
        """Limit of what a policy samples of one trajectory: every turn at its limit."""
        return self.rollout.max_turns * self.rollout.max_new_tokens

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        found = checks.problems(self)
        if found:
            raise ValueError("\n".join(found))
        return self
