"""The `verst` command. Prints for people; everything it does is also a Python call.

One module for each group of commands. They import what they need when a command runs, so that `--help` and completion answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import verst
from verst.cli import audit, completion, machine, models, replay, running, start, stored, timeline
from verst.cli.common import one_line

EXIT_CODES = """exit codes:
  0    done
  1    failed; standard error has the reason, and what to do
  2    wrong usage
  129  the terminal was closed; the run goes on on its cluster
  130  stopped by a signal; `verst resume` continues"""

_EPILOG = f"""a first run:
  verst doctor                           is this machine fit for it, and what to change
  verst init --task chain_sum --model M  a commented run file, run.yaml
  verst check run.yaml                   resolved options, memory and token plan; needs no GPU
  verst train run.yaml train.lr=1e-5     train; any option can be overridden
  verst runs                             what is there, how far it is, what it reached
  verst inspect runs/NAME                what was generated, and how it was rewarded
  verst audit runs/NAME                  that every group was trained exactly once
  verst timeline runs/NAME               who was idle, and what holds it up
  verst eval runs/NAME                   pass@k on held-out prompts
  verst export runs/NAME --out DIR       the model as a Hugging Face directory

`verst COMMAND --help` has examples of each.

{EXIT_CODES}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character gets its number, as on stderr
    options = _parse(arguments)
    from verst.errors import VerstError

    try:
        return options.run(options)
    except VerstError as error:
        said = "\n".join(map(one_line, str(error).split("\n")))  # what users name may have control characters
        print(f"verst: {type(error).__name__}: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"verst: {interrupt if interrupt.args else 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `verst … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more as it ends
        return 1
    except OSError as error:
        if error.filename is None:
            raise  # not about a file: a defect
        print(f"verst: {error.filename}: {error.strerror}: is the path right, may this user use it, is there room?", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; KEY=VALUE may also stand behind an option, which argparse does not allow by itself."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="verst", description=(verst.__doc__ or "").split("\n")[0], epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"verst {verst.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (start, running, stored, audit, timeline, replay, models, machine):
        group.add(commands)
    completion.add(commands, build_parser)
    return parser
