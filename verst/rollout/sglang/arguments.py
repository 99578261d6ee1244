"""`rollout.sglang`: any argument of SGLang's server, checked by SGLang's own parser.

The check imports SGLang, which takes seconds and changes the process it is imported into, so it runs in a process of its own. The server
makes its command line by the same function.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from verst.errors import ConfigError, DeadlineExceeded
from verst.rollout.sglang.environment import INSTALL, server_environment
from verst.rollout.sglang.routes import FLAG, MOVES_CACHE

OWNED = {
    "model_path": "model.path",
    "model": "model.path",
    "dtype": "model.dtype",
    "device": "the placement",
    "host": "the engine: the interface is private",
    "port": "the engine: the system chooses it",
    "api_key": "the engine: a new one for each server",
    "admin_api_key": "the engine: a new one for each server",
    "served_model_name": "model.path",
    "max_running_requests": "rollout.max_running",
    "context_length": "the limits of data and rollout",
    "skip_tokenizer_init": "the engine: token ids go in and out",
    "custom_weight_loader": "the engine: it verifies the weights it loads",
    "weight_version": "the loop",
    "enable_custom_logit_processor": "the engine: it samples with filters",
    "enable_metrics": "the engine: it reads them",
    "enable_deterministic_inference": "run.deterministic",
    "skip_server_warmup": "the engine",
    FLAG: "train.routes",
    "config": "the run file: write the arguments there",
}
"""Arguments that Verst sets itself, and what decides them."""

CHECK_DEADLINE_S = 180.0
_OPTIONAL = {"served_model_name", "admin_api_key", "config", "weight_version"}


def check(arguments: Mapping[str, Any], *, device: str = "cpu", record_routes: bool = False) -> None:
    """Raises `ConfigError` that lists everything wrong: names Verst owns, unknown names with the nearest valid one, bad values.

    With `record_routes` also a release of SGLang that cannot record expert routes, and arguments with which it records wrong ones.

    Starts no server. Raises `ConfigError` with the install line if SGLang is not installed.
    """
    refuse_owned(arguments)
    if record_routes:
        refuse_unroutable(arguments)
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([dict(arguments), record_routes]),
            capture_output=True,
            text=True,
            timeout=CHECK_DEADLINE_S,
            env=server_environment(device),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"waited for SGLang to check its arguments: not done within {CHECK_DEADLINE_S:g} s") from error
    if done.returncode:
        lines = (done.stderr.strip() or "no message").splitlines()
        raise ConfigError(f"rollout.sglang cannot be checked, SGLang's parser broke: {lines[-1]}")
    problems = json.loads(done.stdout.splitlines()[-1])
    if problems:
        raise ConfigError("\n".join(problems))


def refuse_owned(arguments: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming the arguments that Verst sets itself."""
    owned = [f"rollout.sglang.{name} is set by {OWNED[_plain(name)]}: remove it" for name in arguments if _plain(name) in OWNED]
    if owned:
        raise ConfigError("\n".join(owned))


def refuse_unroutable(arguments: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming the arguments with which SGLang records the routes of other tokens."""
    wrong = [
        f"rollout.sglang.{name}: SGLang would record wrong expert routes: remove it, or set train.routes=ignore"
        for name, value in arguments.items()
        if _plain(name) in MOVES_CACHE and value
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def routes_problem(parser: argparse.ArgumentParser) -> str | None:
    """Why the SGLang of this parser cannot record expert routes."""
    option = f"--{FLAG.replace('_', '-')}"
    if any(option in action.option_strings for action in parser._actions):
        return None
    return (
        f"train.routes: the installed SGLang cannot record expert routes, it has no {option}: install 0.5.17 or newer, or set it to ignore"
    )


def command_line(parser: argparse.ArgumentParser, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments as SGLang's command line takes them. Raises `ConfigError` listing those that its parser refuses."""
    actions = {option: action for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    problems: list[str] = []
    for name, value in arguments.items():
        option = f"--{_plain(name).replace('_', '-')}"
        action = actions.get(option)
        if action is None:
            problems.append(_unknown(name, [o for o in actions if o.startswith("--")], option))
            continue
        piece = _words(option, action, value)
        complaint = _complaint(parser, piece)
        if complaint:
            problems.append(f"rollout.sglang.{name}: {complaint}")
        words += piece
    if problems:
        raise ConfigError("\n".join(problems))
    return words


def tensor_ranks(arguments: Mapping[str, Any]) -> int:
    """Tensor-parallel ranks that these arguments ask for."""
    plain = {_plain(name): value for name, value in arguments.items()}
    return int(plain.get("tp_size") or plain.get("tensor_parallel_size") or plain.get("tp") or 1)


def server_parser() -> argparse.ArgumentParser:
    """SGLang's own parser. Raises `ConfigError` with the install line if SGLang is not installed."""
    try:
        from sglang.srt.server_args import ServerArgs
    except ImportError as error:
        raise ConfigError(f"rollout.engine sglang: SGLang cannot be imported ({error}). {INSTALL}") from error
    parser = argparse.ArgumentParser(prog="rollout.sglang", allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    return parser


def supported(parser: argparse.ArgumentParser, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of arguments that Verst sets, those that this release of SGLang has. Raises `ConfigError` if one is missing that must be there."""
    known = {option for action in parser._actions for option in action.option_strings}
    return {name: value for name, value in arguments.items() if f"--{name.replace('_', '-')}" in known or name not in _OPTIONAL}


def _words(option: str, action: argparse.Action, value: Any) -> list[str]:
    if value is None:
        return []
    if action.nargs == 0 or isinstance(value, bool):
        negated = f"--no-{option[2:]}"
        off = [negated] if negated in action.option_strings else []
        return [option] if value else off
    if isinstance(value, list | tuple):
        return [option, *map(str, value)]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]


class _Refused(Exception):
    pass


def _complaint(parser: argparse.ArgumentParser, words: list[str]) -> str | None:
    """What SGLang's parser says against these words, if anything."""

    def refuse(message: str) -> Any:
        raise _Refused(message)

    original, parser.error = parser.error, refuse  # type: ignore[method-assign]
    try:
        parser.parse_args(["--model-path", "model", *words])
    except (_Refused, ValueError) as refused:
        return str(refused)
    finally:
        parser.error = original  # type: ignore[method-assign]
    return None


def _unknown(name: str, options: list[str], option: str) -> str:
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {near[0][2:].replace('-', '_')}?" if near else ""
    return f"rollout.sglang.{name}: SGLang's server has no such argument{hint}"


def _plain(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _main() -> None:
    arguments, record_routes = json.load(sys.stdin)
    problems: list[str] = []
    try:
        parser = server_parser()
        missing = routes_problem(parser) if record_routes else None
        problems += [missing] if missing else []
        command_line(parser, arguments)
    except ConfigError as error:
        problems += str(error).splitlines()
    sys.stdout.write(json.dumps(problems) + "\n")


if __name__ == "__main__":
    _main()
