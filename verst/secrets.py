"""Environment variables that user code and generated code do not see: which they are, and how a process gets rid of them.

A process cannot keep something from code that runs in it and looks for it. This keeps keys out of what such code prints, sends, records
or hands to what it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from verst.errors import ExtensionError

_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "AUTH_SOCK")
"""A variable whose name has one of them is a secret: HF_TOKEN, WANDB_API_KEY, RAY_AUTH_TOKEN, AWS_SECRET_ACCESS_KEY …"""
_NO_SECRETS = frozenset({"TOKENIZERS_PARALLELISM"})
_ENV_START, _ENV_END = 47, 48  # places in /proc/PID/stat after the name of the program: proc_pid_stat(5)

_taken: dict[str, str] = {}
"""What `take` has taken out of this process's environment, for Verst's own use."""


def is_secret(name: str) -> bool:
    return name not in _NO_SECRETS and any(word in name.upper() for word in _WORDS)


def without_secrets(environment: Mapping[str, str], but: Iterable[str] = ()) -> dict[str, str]:
    """The environment as user code may see it; `but` are secrets that it may see all the same."""
    return {name: value for name, value in environment.items() if not is_secret(name) or name in {*but}}


def environment() -> dict[str, str]:
    """This process's, with what was taken out of it."""
    return {**_taken, **os.environ}


def value(name: str) -> str | None:
    """Of one variable, also if it was taken."""
    return os.environ.get(name, _taken.get(name))


def require(names: Iterable[str]) -> None:
    """Raises `ExtensionError` if one that user code is to see is not set here."""
    missing = [name for name in names if value(name) is None]
    if missing:
        raise ExtensionError(f"run.secrets: {', '.join(missing)} is not set in this process's environment: set it where the run is started")


def take(but: Iterable[str] = ()) -> None:
    """Takes all secrets out of this process's environment, also as other processes see it. `lent` and `value` still have them."""
    names = [name for name in os.environ if is_secret(name) and name not in {*but}]
    for name in names:
        _taken[name] = os.environ.pop(name)
    _erase(names)


def give(names: Iterable[str]) -> None:
    """Puts back those of what was taken that user code is to see. Raises `ExtensionError` as `require`."""
    names = [*names]
    require(names)
    os.environ.update({name: _taken[name] for name in names if name not in os.environ})


@contextlib.contextmanager
def lent() -> Iterator[None]:
    """Puts back what was taken, for a library that looks for it in the environment. No user code may run meanwhile."""
    names = [name for name in _taken if name not in os.environ]
    os.environ.update({name: _taken[name] for name in names})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _erase(names: Iterable[str]) -> None:
    """From /proc/PID/environ. It shows the memory that the process began with, which is not what `os.environ` changes."""
    if sys.platform != "linux":
        return
    places = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(places[_ENV_START]), int(places[_ENV_END])
    if not start:  # the kernel does not show it, and then no `environ` either
        return
    gone, offset = {name.encode() for name in names}, 0
    for entry in ctypes.string_at(start, end - start).split(b"\0"):
        if entry.partition(b"=")[0] in gone:
            ctypes.memset(start + offset, 0, len(entry))
        offset += len(entry) + 1
