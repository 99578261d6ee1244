"""The server's process: `python -m verst.rollout.sglang.launch`, told on its standard input what to start.

The first line of the input is JSON: `arguments` by SGLang's names, `api_key` and `parent`. Nothing secret is in the command line, which
everyone can see, or in SGLang's log. The input stays open for as long as the engine lives; at its end the server and all its children
are killed.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


class Secret(str):
    """A text that logs and tracebacks do not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'(hidden)'"


def end_with_parent(parent: int, lifeline: TextIO) -> None:
    """From now on this process group ends when the parent does, even by a SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.killpg(0, signal.SIGKILL)
    threading.Thread(target=_kill_group_at_end, args=(lifeline,), name="lifeline", daemon=True).start()


def _kill_group_at_end(lifeline: TextIO) -> None:
    """Kills this process and all that it started. The schedulers are its children and in its group."""
    while os.read(lifeline.fileno(), 1):  # not by its own `read`, whose lock a fork would copy as it is held
        pass
    os.killpg(0, signal.SIGKILL)


def fork_children() -> None:
    """Makes the processes that SGLang starts copies of this one, which has imported PyTorch, transformers and SGLang by then.

    SGLang wants each to begin anew ("spawn"), because CUDA does not survive a fork. Without CUDA that only means to import all of it three
    times: 37 s of processor time for a start instead of 20, and 1.3 GB of memory instead of 0.7.
    """
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda method, force=False: None


def serve(arguments: dict[str, Any], api_key: str) -> None:
    """Starts SGLang's server and returns when it has ended."""
    from verst.rollout.sglang.arguments import command_line, server_parser, supported

    parser = server_parser()
    words = command_line(parser, supported(parser, arguments))
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        from sglang.srt.plugins import load_plugins
    except ImportError:
        pass  # releases without plugins
    else:
        load_plugins()
    if arguments.get("device") == "cpu":
        fork_children()
    server_args: Any = prepare_server_args(words)
    if hasattr(server_args, "override"):  # 0.5.17 has sealed its record by now
        server_args.override("verst", api_key=Secret(api_key))
    else:
        server_args.api_key = Secret(api_key)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _main() -> None:
    orders = json.loads(sys.stdin.readline())
    end_with_parent(orders["parent"], sys.stdin)
    serve(orders["arguments"], orders["api_key"])


if __name__ == "__main__":
    _main()
