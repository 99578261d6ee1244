"""The inside of a sandbox: `python -I -S sandbox_child.py SETTINGS STATUS_FD`, with the code on standard input.

A script of the standard library alone, so that it starts in milliseconds. It shuts itself in, then runs the code as `main.py` in a fresh
Python and says on the status descriptor, which the code does not have, how it went: a line of JSON with `exit`, `signal` or `failed`, of
which the first counts.

Who ends whom: this process waits for the code (isolated: for process 1 of a new process namespace, whose end is that of everything in it).
SIGTERM makes it end them and go; the death of the process that started it ends it, and with it all of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

_NEW_MOUNTS, _NEW_USER, _NEW_PROCESSES, _NEW_NETWORK, _NEW_IPC = 0x00020000, 0x10000000, 0x20000000, 0x40000000, 0x08000000
_NOSUID, _NODEV, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _SYS_MOUNT_SETATTR = -100, 0x8000, 1, 442
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38
_FIRST_UID = 0x70000000
"""Beyond what machines give to people, services and containers. A number of its own makes a sandbox's count of processes its own."""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    settings, status = json.loads(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(status, False)
    code = sys.stdin.buffer.read()
    _die_with_parent(settings["parent"])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is a child that it can end
    isolated = settings["isolated"]
    try:
        if isolated:
            _isolate(settings)
        child = os.fork()
        if child == 0:
            _inside(settings, status, code)
    except OSError as error:
        _fail(status, error)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _, ended = os.waitpid(child, 0)
    if not isolated:
        _report(status, ended)
        os.killpg(0, signal.SIGKILL)  # what the code has left behind, and this process


def _inside(settings: dict[str, Any], status: int, code: bytes) -> NoReturn:
    """In the child: isolated, it is process 1, which the code cannot end, and the code gets a process of its own."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if sys.platform == "linux":
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if settings["isolated"]:
            child = os.fork()
            if child:
                _report(status, _waited_for(child))
                os._exit(0)
        _run(settings, code)
    except OSError as error:
        _fail(status, error)


def _waited_for(child: int) -> int:
    while True:
        pid, ended = os.waitpid(-1, 0)  # any: process 1 inherits the orphans
        if pid == child:
            return ended


def _run(settings: dict[str, Any], code: bytes) -> NoReturn:
    os.chdir(settings["directory"])
    with open("main.py", "wb") as file:
        file.write(code)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limits = settings["limits"]
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (limit, limit))
    if settings["isolated"] and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
    if sys.platform == "linux":
        _prctl(_SET_NO_NEW_PRIVILEGES, 1)
    os.execve(settings["python"], [settings["python"], "-I", "-B", "-u", "main.py"], settings["environment"])


def _isolate(settings: dict[str, Any]) -> None:
    """Namespaces of users (unless root), mounts, processes, IPC and the network, which is empty. Raises `OSError` with what was refused."""
    namespaces = _NEW_MOUNTS | _NEW_PROCESSES | _NEW_NETWORK | _NEW_IPC
    uid, gid = os.getuid(), os.getgid()
    settings["uid"] = _FIRST_UID + os.getpid()
    if uid:
        _check(_libc.unshare(namespaces | _NEW_USER), "unshare of user and network namespaces")
        _prctl(_SET_DUMPABLE, 1)
        # to itself and not to root: so the capabilities of the namespace are gone as soon as the code runs
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    else:
        _check(_libc.unshare(namespaces), "unshare of mount and network namespaces")
    _mount(None, "/", None, _RECURSIVE | _PRIVATE, None)
    _make_read_only("/")
    os.umask(0o022)
    _cover(settings)


def _cover(settings: dict[str, Any]) -> None:
    """Puts empty directories over those that hold what is none of the code's business, and brings back what Python needs of them.

    An empty file over such files: last, since they may lie in what was brought back.
    """
    kept = {path: os.open(path, os.O_PATH) for path in settings["kept"]}
    for path in settings["writable"]:
        _mount("tmpfs", path, "tmpfs", _NOSUID | _NODEV, f"size={settings['disk_bytes']},mode=1777")
    for path in settings["hidden"]:
        if os.path.isdir(path):
            _mount("tmpfs", path, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path, descriptor in kept.items():
        if any(path.startswith(f"{covered}/") for covered in (*settings["hidden"], *settings["writable"])):
            os.makedirs(path, exist_ok=True)
            _mount(f"/proc/self/fd/{descriptor}", path, None, _BIND | _RECURSIVE, None)
        os.close(descriptor)
    for path in settings["hidden"]:
        if os.path.isdir(path):
            _make_read_only(path)
        elif os.path.isfile(path):
            _mount("/dev/null", path, None, _BIND, None)
    _mount("tmpfs", "/proc", "tmpfs", _NOSUID | _NODEV, "size=4k,mode=555")  # last: the line above goes by it


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def _make_read_only(path: str) -> None:
    wanted = _Attributes(_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    found = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, ctypes.byref(wanted), size)
    _check(found, f"mount_setattr of {path} (Linux 5.12)")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check(_libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount of {target}")


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _report(status: int, ended: int) -> None:
    code = os.waitstatus_to_exitcode(ended)
    _tell(status, {"exit": code} if code >= 0 else {"signal": signal.Signals(-code).name})


def _fail(status: int, error: OSError) -> NoReturn:
    text = error.strerror or str(error)
    _tell(status, {"failed": f"{text} ({error.filename})" if error.filename else text})
    os._exit(1)


def _tell(status: int, what: dict[str, Any]) -> None:
    os.write(status, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
