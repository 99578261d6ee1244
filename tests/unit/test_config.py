"""The run file: what is accepted, and how a mistake is explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from verst.config.algorithms import PRESETS, ComparingConfig, DapoConfig
from verst.config.checks import scores, warnings
from verst.config.evaluated import best_metrics, due
from verst.config.load import dump_config, load_config, option_names
from verst.config.schema import Config
from verst.errors import ConfigError

MINIMAL = {"run": {"steps": 3}, "model": {"path": "models/tiny"}}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_every_option_has_earned_its_place():
    # Not a limit of taste: each option is documented, honoured and tested. Raise the number together with the reason, in the changelog.
    # of the newest seven, ppo's: a critic has a discount, a λ, a bound, a model to begin from, a rate and a warm-up that no other option
    # implies; whether advantages are normalised is the reward's scale to say
    # of the seven before: which filters and hooks, how long each may take, and whether a run goes on without a hook; what is evaluated
    # beside the held-out share, and by which figure a checkpoint is the best, are a run's owner's to say
    # what changes at a step, beta of DPO, its one hyperparameter, and which prompts come first is an experiment's to say
    # of the one before: which model transformers does not know is in no file of that model
    # run.secrets: which of their keys somebody's own code may see is nobody else's to say
    # algorithm.teacher: whom a policy learns from has no default
    # of the two before: whose advantages and whose loss are an experiment's to say
    assert len({name for preset in PRESETS for name in option_names(preset)}) == 114


def test_resolved_config_reads_back_to_itself(tmp_path: Path):
    config = load_config(MINIMAL, ["algorithm.name=sft", "train.betas=[0.8, 0.99]"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_overrides_win_and_are_read_as_yaml():
    config = load_config(MINIMAL, ["train.lr=1e-5", "data.path=null", "rollout.stop=['</a>', x]", "run.name=night"])
    assert (config.train.lr, config.data.path, config.rollout.stop, config.run.name) == (1e-5, None, ["</a>", "x"], "night")


def test_the_callers_mapping_is_left_alone():
    values = {"run": {"steps": 3}, "model": {"path": "m"}}
    load_config(values, ["run.steps=5"])
    assert values == {"run": {"steps": 3}, "model": {"path": "m"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run: {steps: 3}\nmodel: {path: m}\ntrain:\n  warmup_step: 1\n",
            r"run\.yaml:4: unknown option .*did you mean train\.warmup_steps\?",
        ),
        (
            "run: {steps: 3}\nmodel: {path: m}\nalgorithm: {name: grpo, clip_hi: 1}\n",
            r"algorithm\.clip_hi; did you mean algorithm\.clip_high\?",
        ),
        (
            "run: {steps: 3}\nmodel: {path: m}\nalgorithm: {name: a2c}\n",
            r"algorithm\.name: 'a2c' is not an algorithm; there are: grpo, dr_grpo, .*, sft",
        ),
        ("run: {steps: 3}\nmodel: {path: m}\nalgorithm: {clip_low: 0.1}\n", r"algorithm\.name is required: one of grpo, dr_grpo, .*, sft"),
        ("run: {steps: 3}\nmodel: {path: m}\nrollout: {group_size: 1}\n", r"rollout\.group_size is 1, but grpo's baseline"),
        (
            "run: {steps: 3}\nmodel: {path: m}\nrollout: {capacity_groups: 3}\n",
            r"capacity_groups \(3\) is below train\.groups_per_step \(16\)",
        ),
        ("run: {steps: 3}\nmodel: {path: m}\ndata: {path: a.jsonl, task: chain_sum}\n", r"are set: keep one"),
        (
            "run: {steps: 3}\nmodel: {path: m}\ntrain: {microbatch_tokens: 100}\n",
            r"microbatch_tokens \(100\) is below the longest trajectory \(1280",
        ),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=3", "expected KEY=VALUE"),
        ("train..lr=3", "expected KEY=VALUE"),
        ("train.lrr=3", r"did you mean train\.lr\?"),
    ],
)
def test_bad_overrides_are_explained(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(MINIMAL, [override])


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config({"run": {"stps": 3}, "model": {"path": "m", "dtyp": "x"}})
    assert len(str(caught.value).splitlines()) == 3  # two unknown options and the missing run.steps


def test_every_option_is_described():
    def undescribed(model: Any, prefix: str) -> list[str]:
        return [
            f"{prefix}{n}" for n, f in model.model_fields.items() if f.description is None and not hasattr(f.annotation, "model_fields")
        ]

    sections = {n: f.annotation for n, f in Config.model_fields.items() if hasattr(f.annotation, "model_fields")}
    missing = [name for section, model in sections.items() for name in undescribed(model, f"{section}.")]
    assert missing == []


def test_yaml_of_the_resolved_config_is_plain():
    assert yaml.safe_load(dump_config(load_config(MINIMAL)))["algorithm"]["name"] == "grpo"


@pytest.mark.parametrize(
    "override",
    [
        *(
            f"{key}={value}"
            for key in ("train.lr", "train.clip_norm", "rollout.temperature", "eval.temperature")
            for value in (".inf", ".nan")
        ),
        *("train.lr=-1e-5", "train.lr=2", "train.betas=[0.9, 1.0]", "train.betas=[.nan, 0.9]", "train.betas=[-0.1, 0.9]"),
        *("train.betas=[0.9]", "train.weight_decay=.inf", "train.weight_decay=1e9", "train.deadline_s=.inf", "train.deadline_s=1e300"),
        *("rollout.temperature=1e-9", "rollout.temperature=1e6", "rollout.top_p=0", "rollout.top_p=.nan", "rollout.min_p=1"),
        *("algorithm.clip_low=2", "algorithm.clip_high=.inf", "algorithm.kl_coefficient=.inf", "weights.probe_limit=.inf"),
        *("data.holdout=.nan", "run.seed=4294967296", "run.steps=true", "train.lr=yes", "run.steps=1e30", "run.steps=2.5"),
        *("reward.options.weight=.inf", "reward.options.day=2026-01-01", "model.path=", "model.path=''", "rollout.stop=['']"),
        "run.name=x.partial",
    ],
)
def test_numbers_out_of_range_and_values_a_file_cannot_hold_are_refused(override: str):
    key = override.split("=")[0]
    algorithm = ["algorithm.name=grpo"] if key.startswith("algorithm.") else []
    option = "reward.options" if key.startswith("reward.options") else key
    with pytest.raises(ConfigError, match=rf"^override {re.escape(repr(override))}: {re.escape(option)}\b[^\n]*$"):
        load_config(MINIMAL, [*algorithm, override])


def test_a_wrong_number_is_told_with_its_line(tmp_path: Path):
    text = "run: {steps: 3}\nmodel: {path: m}\ntrain:\n  lr: 1\n  betas: [0.9, 1.5]\nreward:\n  options: {weight: .nan}\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{tmp_path}/run.yaml:7", "reward.options.weight"],
        [f"{tmp_path}/run.yaml:5", "train.betas"],
    ]


@pytest.mark.parametrize("name", ["a2c", "null"])
def test_an_unknown_algorithm_is_told_with_the_line_of_its_name(tmp_path: Path, name: str):
    text = f"run: {{steps: 3}}\nmodel: {{path: m}}\nalgorithm:\n  clip_low: 0.1\n  name: {name}\n"
    with pytest.raises(ConfigError, match=r"run\.yaml:5: algorithm\.name: .* is not an algorithm"):
        load_config(write(tmp_path, text))


SFT = ["algorithm.name=sft"]
HELD_OUT = ["data.holdout=0.1", "eval.every_steps=5"]


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        *(
            (SFT, f"rollout.{option}", "sample nothing")
            for option in ("group_size=4", "temperature=0.5", "top_p=0.9", "top_k=5", "min_p=0.1")
        ),
        ([*SFT, *HELD_OUT], "rollout.temperature=0.5", "sample nothing"),
        (SFT, "rollout.environment=second_try", "only for evaluation"),
        (SFT, "rollout.environment_options={tries: 3}", "only for evaluation"),
        (SFT, "rollout.max_turns=2", "only for evaluation"),
        (SFT, "rollout.stop=[x]", "only for evaluation"),
        (SFT, "reward.function=regex", "only for evaluation"),
        (SFT, "reward.workers=2", "only for evaluation"),
        ([], "data.options={min_terms: 2}", r"data\.task and data\.dataset, neither of which is set"),
        ([], "eval.prompts=5", r"not evaluated without eval\.every_steps"),
        ([], "eval.temperature=0.5", r"not evaluated without eval\.every_steps"),
        (["algorithm.name=grpo"], "algorithm.kl_in=reward", "no KL term"),
        (["algorithm.name=grpo"], "algorithm.kl_estimator=k2", "no KL term"),
    ],
)
def test_an_option_that_does_not_apply_is_refused_with_the_reason(tmp_path: Path, overrides: list[str], key: str, reason: str):
    name = key.split("=")[0]
    expected = rf"^override '{re.escape(key)}': {name} does not apply: .*{reason}.*Remove it, or set {name}=null on the command line$"
    with pytest.raises(ConfigError, match=expected):
        load_config(MINIMAL, [*overrides, key])
    resolved = yaml.safe_load(dump_config(load_config(MINIMAL, overrides)))
    section, option = name.split(".")
    assert option not in resolved.get(section, {})


def test_what_does_not_apply_is_told_with_its_line_and_can_be_unset_by_an_override(tmp_path: Path):
    path = write(tmp_path, "run: {steps: 3}\nmodel: {path: m}\nrollout:\n  top_p: 0.9\nalgorithm:\n  name: sft\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:4: rollout\.top_p does not apply"):
        load_config(path)
    assert load_config(path, ["rollout.top_p=null"]).rollout.top_p == 1.0


def test_options_apply_again_with_what_they_belong_to():
    load_config(
        MINIMAL, [*SFT, *HELD_OUT, "rollout.max_turns=2", "reward.function=regex", "eval.prompts=3", "data.columns.demonstration=a"]
    )
    load_config(
        MINIMAL, ["algorithm={name: grpo, kl_coefficient: 0.1, kl_in: reward, kl_estimator: k2}", "data.task=aiw", "data.options={size: 3}"]
    )


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("grpo", {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "token_mean", "normalize_std": True, "dynamic_sampling": False}),
        ("dr_grpo", {"clip_high": 0.2, "aggregate": "constant", "normalize_std": False}),
        ("dapo", {"clip_low": 0.2, "clip_high": 0.28, "aggregate": "token_mean", "dynamic_sampling": True, "overlong_share": 0.2}),
        ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean"}),
        ("cispo", {"clip_low": 1.0, "clip_high": 4.0, "aggregate": "token_mean"}),
        ("rloo", {"aggregate": "constant", "kl_in": "reward", "kl_estimator": "k1"}),
        ("reinforce_plus_plus", {"clip_low": 0.2, "kl_in": "reward", "kl_estimator": "k1"}),
        ("reinforce_plus_plus_baseline", {"clip_low": 0.2, "kl_in": "loss", "kl_estimator": "k2", "dynamic_sampling": False}),
        ("ppo", {"clip_low": 0.2, "kl_in": "reward", "kl_estimator": "k1", "gamma": 1.0, "gae_lambda": 0.95, "value_clip": 0.2}),
        ("best_of_n", {"aggregate": "token_mean", "reward_above": 0.0}),
        ("sft", {"aggregate": "token_mean"}),
        ("dpo", {"beta": 0.1}),
        ("online_dpo", {"beta": 0.1}),
    ],
)
def test_a_name_sets_the_defaults_of_its_paper_and_check_shows_them(name: str, defaults: dict[str, Any]):
    config = load_config(MINIMAL, [f"algorithm.name={name}"])
    values = config.algorithm.model_dump()
    assert values | defaults == values
    shown = yaml.safe_load(dump_config(config))["algorithm"]
    assert shown == {option: value for option, value in values.items() if option not in ("kl_in", "kl_estimator")}  # there is no KL term


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("rloo", "clip_low: 0.1"),
        ("rloo", "normalize_std: true"),
        ("reinforce_plus_plus", "dynamic_sampling: true"),
        ("reinforce_plus_plus_baseline", "normalize_std: true"),
        ("ppo", "normalize_std: true"),
        ("ppo", "advantages: 'own:advantages'"),
        ("grpo", "gae_lambda: 0.9"),
        ("best_of_n", "kl_coefficient: 0.1"),
        ("sft", "reward_above: 1"),
        ("dpo", "aggregate: token_mean"),
        ("grpo", "reward_above: 1"),
    ],
)
def test_an_option_of_another_algorithm_is_refused_by_name(name: str, option: str):
    key = option.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"unknown option algorithm\.{key}, which {name} does not have; it is an option of: \w+"):
        load_config(MINIMAL, [f"algorithm={{name: {name}, {option}}}"])


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("name: grpo, loss: 'own:loss', clip_low: 0.1", "clip_low"),
        ("name: cispo, loss: 'own:loss', clip_high: 5.0", "clip_high"),
        ("name: ppo, loss: 'own:loss', clip_high: 0.3", "clip_high"),
        ("name: dapo, advantages: 'own:advantages', normalize_std: false", "normalize_std"),
    ],
)
def test_what_a_users_own_function_never_reads_is_refused(algorithm: str, key: str):
    own = "loss" if "clip" in key else "advantages"
    with pytest.raises(ConfigError, match=rf"algorithm\.{key} does not apply: algorithm\.{own}, your own"):
        load_config(MINIMAL, [f"algorithm={{{algorithm}}}"])
    load_config(MINIMAL, [f"algorithm={{{algorithm}}}", f"algorithm.{key}=null"])
    load_config(MINIMAL, [f"algorithm={{{algorithm}}}", f"algorithm.{own}=null"])


def test_what_a_users_own_function_leaves_to_the_algorithm_is_accepted():
    both = "loss: 'own:loss', advantages: 'own:advantages'"
    options = "aggregate: constant, kl_coefficient: 0.1, kl_estimator: k2, overlong_share: 0.1, dynamic_sampling: true"
    load_config(MINIMAL, [f"algorithm={{name: grpo, {both}, {options}}}"])
    load_config(MINIMAL, ["algorithm={name: grpo, loss: 'own:loss', normalize_std: false}"])
    load_config(MINIMAL, ["algorithm={name: grpo, advantages: 'own:advantages', clip_low: 0.1}"])


def test_overrides_win_over_a_preset():
    algorithm = load_config(MINIMAL, ["algorithm={name: dapo, overlong_share: 0}", "algorithm.clip_high=0.25"]).algorithm
    assert isinstance(algorithm, DapoConfig)
    assert (algorithm.overlong_share, algorithm.clip_high, algorithm.dynamic_sampling) == (0, 0.25, True)


COMPARING = [name for name, preset in PRESETS.items() if issubclass(preset, ComparingConfig)]


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"sft", "dpo", "online_dpo", "distill"}))
def test_a_group_of_one_is_refused_where_the_baseline_is_the_groups(name: str):
    asked = [f"algorithm.name={name}", "rollout.group_size=1"]
    assert len(COMPARING) == 7
    if name not in COMPARING:
        load_config(MINIMAL, asked)
        return
    with pytest.raises(ConfigError, match=rf"group_size is 1, but {name}'s baseline"):
        load_config(MINIMAL, asked)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"sft", "dpo", "online_dpo", "best_of_n", "distill"}))
def test_every_policy_gradient_needs_to_know_of_staleness(name: str):
    with pytest.raises(ConfigError, match=r"capacity_groups \(32\) lets tokens be 1 versions old.*set algorithm.old_logprobs=behaviour"):
        load_config(MINIMAL, ["rollout.capacity_groups=32", f"algorithm.name={name}"])
    load_config(MINIMAL, ["rollout.capacity_groups=32", f"algorithm={{name: {name}, old_logprobs: behaviour}}"])


AHEAD = ["rollout.capacity_groups=32"]


def test_running_ahead_needs_a_loss_that_knows_of_it():
    with pytest.raises(ConfigError, match=r"capacity_groups \(32\) lets tokens be 1 versions old.*set algorithm.old_logprobs=behaviour"):
        load_config(MINIMAL, AHEAD)
    load_config(MINIMAL, [*AHEAD, "algorithm={name: grpo, old_logprobs: behaviour}"])
    load_config(MINIMAL, [*AHEAD, "algorithm={name: grpo, corrections: [{kind: truncate, level: token, upper: 2}]}"])
    distill = "name: distill, teacher: m"
    with pytest.raises(ConfigError, match=r"set algorithm\.old_logprobs=behaviour"):
        load_config(MINIMAL, [*AHEAD, f"algorithm={{{distill}}}"])
    load_config(MINIMAL, [*AHEAD, f"algorithm={{{distill}, old_logprobs: behaviour}}", "rollout.group_size=1"])
    load_config(MINIMAL, [*AHEAD, "algorithm.name=sft"])
    load_config(MINIMAL, [*AHEAD, "algorithm.name=best_of_n"])  # imitates an older policy's answers, and has no ratio


@pytest.mark.parametrize(("capacity", "window", "bound"), [(16, 1, 0), (17, 1, 1), (32, 1, 1), (33, 1, 2), (48, 16, 3), (48, 18, 4)])
def test_the_bound_of_staleness(capacity: int, window: int, bound: int):
    options = [f"rollout.capacity_groups={capacity}", "algorithm={name: grpo, old_logprobs: behaviour}"]
    config = load_config(MINIMAL, [*options, *([f"rollout.window_groups={window}"] if window > 1 else [])])
    assert config.worst_staleness == bound


def test_options_of_what_is_switched_off_by_name_may_stay():
    """`eval.every_steps=0` on the command line must not ask for a change of the file."""
    given = {"algorithm": {"name": "grpo", "kl_coefficient": 0.1, "kl_in": "loss"}, "eval": {"every_steps": 5, "prompts": 8}}
    config = load_config(MINIMAL | given | {"data": {"holdout": 0.1}}, ["eval.every_steps=0", "algorithm.kl_coefficient=0"])
    assert (config.eval.every_steps, config.eval.prompts) == (0, 8)


@pytest.mark.parametrize("override", ["rollout.temperature=0", "rollout.top_k=1"])
def test_greedy_sampling_has_nothing_to_compare(override: str):
    with pytest.raises(ConfigError, match=r"\(greedy\), so the trajectories of a group would all be the same"):
        load_config(MINIMAL, [override])


def test_what_is_cut_depends_on_the_pace_of_the_machine():
    with pytest.raises(ConfigError, match=r"rollout.oversample: .* Set run.deterministic=false"):
        load_config(MINIMAL, ["rollout.oversample=2"])
    config = load_config(MINIMAL, ["rollout.oversample=2", "run.deterministic=false"])
    assert config.rolled_per_group == config.rollout.group_size + 2


def test_problems_between_options_are_told_together():
    with pytest.raises(ConfigError) as caught:
        load_config(MINIMAL, ["rollout.temperature=0", "rollout.capacity_groups=3", "eval.every_steps=3", "train.minibatches=20"])
    assert [line.split(": ")[1].split()[0] for line in str(caught.value).splitlines()] == [
        "eval.every_steps",
        "rollout.temperature",
        "rollout.capacity_groups",
        "train.minibatches",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.top_p=0.9", "rollout.top_p: log-probabilities"),
        ("rollout.top_k=50", "rollout.top_k: log-probabilities"),
        ("rollout.min_p=0.1", "rollout.min_p: log-probabilities"),
        ("train.warmup_steps=3", r"all steps are warm-up"),
    ],
)
def test_what_a_run_may_do_but_should_know(override: str, message: str):
    (warning,) = warnings(load_config(MINIMAL, [override]))
    assert re.search(message, warning)
    assert warnings(load_config(MINIMAL)) == []


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml")), ids=lambda f: f.stem)
def test_the_shipped_examples_are_valid_and_read_back(tmp_path: Path, file: Path):
    config = load_config(file)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert warnings(config) == []


@pytest.mark.parametrize(
    ("name", "given", "scored"),
    [
        ("grpo", False, True),
        ("online_dpo", False, True),
        ("sft", True, False),
        ("dpo", True, False),
        ("distill", False, False),
        ("distill", True, True),
    ],
)
def test_whether_what_is_trained_is_scored(name: str, given: bool, scored: bool):
    values = {"run": {"steps": 1}, "model": {"path": "m"}, "algorithm": {"name": name} | ({"teacher": "t"} if name == "distill" else {})}
    assert scores(load_config(values), reward_given=given) == scored


SETS: dict[str, Any] = {"run": {"steps": 3}, "model": {"path": "m"}, "eval": {"sets": {"math": {"path": "a.jsonl", "every_steps": 2}}}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.sets.math.every_steps=null", "eval.sets.math.every_steps is required: set it"),
        ("eval.sets.math.every=2", "unknown option eval.sets.math.every; did you mean eval.sets.math.every_steps?"),
        ("eval.sets.math.holdout=0.1", "unknown option eval.sets.math.holdout; valid here: path, dataset"),
        ("eval.sets.math.prompts=some", "eval.sets.math.prompts: expected a whole number"),
        ("eval.sets={ma th: {path: a.jsonl, every_steps: 2}}", "a set's name may have up to 64 letters, digits"),
        ("eval.sets.math.task=aiw", "eval.sets.math has path and task: set exactly one"),
        ("eval.sets.math.path=null", "eval.sets.math has no source of prompts: set exactly one"),
        ("eval.sets.math.options={size: 3}", "eval.sets.math.options does not apply"),
        ("eval.sets.math.samples=4", "eval.sets.math.samples is 4, but temperature 0 is greedy"),
        ("checkpoint.best=reward", "checkpoint.best is reward, which this run never measures .* there are: eval/math/reward$"),
        ("checkpoint.best=eval/reward", "checkpoint.best is eval/reward, .* there are: eval/math/reward$"),
    ],
)
def test_mistakes_in_a_set_are_told_by_its_name(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(SETS, [override])


def test_what_is_evaluated_and_when_by_hand():
    """The held-out share every 4 steps and a set every 6, in 9 steps: what is due, and which of its metrics can name the best."""
    found = load_config(SETS, ["run.steps=9", "data.holdout=0.1", "eval.every_steps=4", "eval.sets.math.every_steps=6"])
    assert {step: [one.prefix for one in due(found, step)] for step in range(10) if due(found, step)} == {
        0: ["eval/", "eval/math/"],
        4: ["eval/"],
        6: ["eval/math/"],
        8: ["eval/"],
        9: ["eval/", "eval/math/"],
    }
    assert best_metrics(found) == ["eval/reward", "eval/math/reward"]
    sampled = load_config(SETS, ["eval.sets.math={task: aiw, every_steps: 1, samples: 6, temperature: 1}"])
    assert best_metrics(sampled) == ["eval/math/reward", *(f"eval/math/pass_at_{k}" for k in (1, 2, 4, 6))]
    assert yaml.safe_load(dump_config(found))["eval"]["sets"]["math"]["every_steps"] == 6


def test_a_taught_run_rolls_for_its_sets():
    load_config(SETS, [*SFT, "reward.function=regex", "rollout.max_turns=2"])
