"""`verst completion SHELL`: a script that completes commands, options, their choices, files, and the options of run files.

Everything in it is read from the parser and the schema when it is printed, so a new option needs nothing here.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verst.cli.common import command, echo


@dataclass(frozen=True, slots=True)
class Completed:
    """One command: its options with their help, choices where there are some, which of them are flags, and whether it takes KEY=VALUE.

    `keys`: those of its own, such as `rollout=`.
    """

    name: str
    about: str
    options: dict[str, str]
    choices: dict[str, list[str]]
    flags: set[str]
    takes_overrides: bool
    words: list[str]
    """Choices of its positional argument."""
    keys: list[str]


def add(commands: Any, build: Callable[[], argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "completion",
        "print a script that completes commands, options and files in your shell",
        "verst completion bash > ~/.local/share/bash-completion/completions/verst",
        "verst completion zsh > ~/.zfunc/_verst      where fpath has ~/.zfunc",
        "verst completion fish > ~/.config/fish/completions/verst.fish",
        'eval "$(verst completion bash)"             for this shell only',
    )
    parser.add_argument("shell", choices=sorted(SCRIPTS), help="which shell it is for")
    parser.set_defaults(run=lambda options: _print(options, build))


def _print(options: argparse.Namespace, build: Callable[[], argparse.ArgumentParser]) -> int:
    from verst.config.load import option_names

    keys = sorted({*option_names("grpo"), *option_names("sft")})
    echo(SCRIPTS[options.shell](commands_of(build()), [f"{key}=" for key in keys]))
    return 0


def commands_of(parser: argparse.ArgumentParser) -> list[Completed]:
    """What there is to complete, from the parser."""
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    about = {action.dest: action.help or "" for action in subparsers._choices_actions}
    return [_completed(name, about.get(name, ""), sub) for name, sub in subparsers.choices.items()]


def _completed(name: str, about: str, parser: argparse.ArgumentParser) -> Completed:
    options, choices, flags, words, overrides, keys = {}, {}, set(), [], False, []
    for action in parser._actions:
        longest = max(action.option_strings, key=len, default=None)
        if longest is None:
            overrides |= action.dest == "overrides"
            words += map(str, action.choices or ())
            key, equals, _ = str(action.metavar or "").partition("=")
            keys += [f"{key}="] if equals and action.dest != "overrides" else []
        else:
            options[longest] = " ".join((action.help or "").replace("%%", "%").split())
            if action.nargs == 0:
                flags.add(longest)
            if action.choices:
                choices[longest] = list(map(str, action.choices))
    return Completed(name, about, options, choices, flags, overrides, words, keys)


def _bash(commands: Sequence[Completed], keys: Sequence[str]) -> str:
    cases = "\n".join(_bash_case(c) for c in commands)
    return f"""# Completion of verst for bash, made by `verst completion bash`.
_verst() {{
    local cur prev command words="" choices="" keys="" i
    COMPREPLY=()
    cur=${{COMP_WORDS[COMP_CWORD]}}
    prev=${{COMP_WORDS[COMP_CWORD-1]}}
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${{COMP_WORDS[i]}} != -* ]] && command=${{COMP_WORDS[i]}} && break
    done
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W {shlex.quote(" ".join([*(c.name for c in commands), "--help", "--version"]))} -- "$cur"))
        return
    fi
    case $command in
{cases}
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
    elif [[ -n $choices ]]; then
        COMPREPLY=($(compgen -W "$choices" -- "$cur"))
    else
        [[ -n $cur && $prev != = ]] && COMPREPLY=($(compgen -W "$keys" -- "$cur"))
        if [[ ${{#COMPREPLY[@]}} -gt 0 ]]; then
            compopt -o nospace 2> /dev/null
        else
            compopt -o filenames 2> /dev/null  # which would put a backslash before the = of a key
            COMPREPLY=($(compgen -f -- "${{cur#=}}"))
        fi
    fi
}}
_verst_keys={shlex.quote(" ".join(keys))}
complete -F _verst verst"""


def _bash_case(completed: Completed) -> str:
    lines = [f"        {completed.name})", f"            words={shlex.quote(' '.join(completed.options))}"]
    if completed.takes_overrides:
        lines.append("            keys=$_verst_keys")
    elif completed.keys:
        lines.append(f"            keys={shlex.quote(' '.join(completed.keys))}")
    if completed.words:
        lines.append(f"            choices={shlex.quote(' '.join(completed.words))}")
    if completed.choices:
        lines.append("            case $prev in")
        lines += [f"                {name}) choices={shlex.quote(' '.join(values))} ;;" for name, values in completed.choices.items()]
        lines.append("            esac")
    return "\n".join([*lines, "            ;;"])


def _zsh(commands: Sequence[Completed], keys: Sequence[str]) -> str:
    described = "\n".join(f"        {shlex.quote(f'{c.name}:{c.about}')}" for c in commands)
    cases = "\n".join(_zsh_case(c) for c in commands)
    return f"""#compdef verst
# Completion of verst for zsh, made by `verst completion zsh`.
_verst() {{
    local -a commands keys
    commands=(
{described}
    )
    keys=({" ".join(keys)})
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local chosen=$words[2]
    shift words
    (( CURRENT-- ))
    case $chosen in
{cases}
    esac
}}
_verst_words() {{
    _files
    compadd -S '' -- $keys
}}
if [[ $funcstack[1] == _verst ]]; then
    _verst "$@"
else
    compdef _verst verst
fi"""


def _zsh_case(completed: Completed) -> str:
    specs = []
    for name, about in completed.options.items():
        shown = about.replace("[", "(").replace("]", ")").replace(":", " -")
        values = f"({' '.join(completed.choices[name])})" if name in completed.choices else "_files"
        specs.append(shlex.quote(f"*{name}[{shown}]" + ("" if name in completed.flags else f":value:{values}")))
    rest = (
        f"*:word:({' '.join(completed.words)})"
        if completed.words
        else "*:word:_verst_words"
        if completed.takes_overrides
        else f"*:word:{{_files; compadd -S '' -- {' '.join(completed.keys)}}}"
        if completed.keys
        else "*:file:_files"
    )
    return f"        {completed.name}) _arguments {' '.join(specs)} {shlex.quote(rest)} ;;"


def _fish(commands: Sequence[Completed], keys: Sequence[str]) -> str:
    lines = ["# Completion of verst for fish, made by `verst completion fish`."]
    for c in commands:
        lines.append(f"complete -c verst -n __fish_use_subcommand -f -a {c.name} -d {shlex.quote(c.about)}")
        inside = f"-n {shlex.quote(f'__fish_seen_subcommand_from {c.name}')}"
        for name, about in c.options.items():
            values = f" -x -a {shlex.quote(' '.join(c.choices[name]))}" if name in c.choices else "" if name in c.flags else " -r"
            lines.append(f"complete -c verst {inside} -l {name.removeprefix('--')}{values} -d {shlex.quote(about)}")
        if c.words:
            lines.append(f"complete -c verst {inside} -f -a {shlex.quote(' '.join(c.words))}")
        if c.takes_overrides or c.keys:
            lines.append(f"complete -c verst {inside} -a {shlex.quote(' '.join(c.keys or keys))}")
    return "\n".join(lines)


SCRIPTS: dict[str, Callable[[Sequence[Completed], Sequence[str]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
