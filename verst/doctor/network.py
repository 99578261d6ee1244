"""What processes of a run talk by: the loopback, ports, RDMA devices."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from verst.doctor.findings import Finding

_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_INFINIBAND = Path("/sys/class/infiniband")
_TCP = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ENOUGH_PORTS = 1000
_LISTENERS = 32
"""Ports that are opened at once to see that they can be."""


def network_findings() -> Iterator[Finding]:
    yield _loopback()
    yield _ports()
    yield rdma_devices(_INFINIBAND)


def _loopback() -> Finding:
    """On it SGLang's servers listen, where nobody else's requests arrive."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            socket.create_connection(listener.getsockname(), timeout=1).close()
    except OSError as error:
        return Finding("loopback", str(error), "", "LACKING", "processes of one machine talk by 127.0.0.1: allow it (ip link set lo up)")
    return Finding("loopback", "127.0.0.1 (Ray, gloo, SGLang's servers)", "", "ok")


def _ports() -> Finding:
    """Every process of a run takes some from the range that the system gives out."""
    advice = "Ray's processes, gloo and SGLang take several ports each: widen net.ipv4.ip_local_port_range (sysctl), or end what holds them"
    opened: list[socket.socket] = []
    try:
        for _ in range(_LISTENERS):
            opened.append(socket.socket())
            opened[-1].bind(("", 0))
    except OSError as error:
        return Finding("free ports", f"{len(opened) - 1} could be opened: {error.strerror}", "", "LACKING", advice)
    finally:
        for listener in opened:
            listener.close()
    try:
        low, high = map(int, _PORTS.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return Finding("free ports", f"{_LISTENERS} could be opened at once", "", "ok")
    free = high - low + 1 - len({port for port in _ports_in_use() if low <= port <= high})
    few = free < _ENOUGH_PORTS
    return Finding("free ports", f"{free} of {low} to {high}", "", "low" if few else "ok", advice if few else "")


def _ports_in_use() -> Iterator[int]:
    for path in _TCP:
        with suppress(OSError):
            for line in path.read_text(encoding="ascii").splitlines()[1:]:
                yield int(line.split()[1].rpartition(":")[2], 16)


def rdma_devices(directory: Path) -> Finding:
    """Each device with the states of its ports, by the kernel's files."""
    devices = {path.name: _states(path) for path in sorted(directory.glob("*"))}
    if not devices:
        return Finding("RDMA devices", "none: NCCL and gloo use TCP between machines", "", "ok")
    shown = ", ".join(f"{name} ({', '.join(states) or 'no port'})" for name, states in devices.items())
    down = [name for name, states in devices.items() if "ACTIVE" not in states]
    advice = f"no port of {', '.join(down)} is active: see cable, switch and subnet manager (ibstat), or leave it out with NCCL_IB_HCA"
    return Finding("RDMA devices", shown, "", "low" if down else "ok", advice if down else "")


def _states(device: Path) -> list[str]:
    found = []
    for port in sorted((device / "ports").glob("*")):
        with suppress(OSError):
            found.append((port / "state").read_text(encoding="ascii").strip().rpartition(" ")[2])  # "4: ACTIVE"
    return found
