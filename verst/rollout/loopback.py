"""Calls to sessions stay on the machine, also where the environment names a proxy.

Agents call `127.0.0.1` with clients of their own, most of which heed `HTTP_PROXY`. A proxy could not answer them, and would see the
session's key and the prompts.
"""

from __future__ import annotations

from collections.abc import MutableMapping

_HOSTS = ("127.0.0.1", "localhost")


def bypass_proxies(environment: MutableMapping[str, str]) -> None:
    """Adds this machine to what no proxy is asked for. Repeating it changes nothing. It is for a process that has no client yet."""
    upper, lower = environment.get("NO_PROXY"), environment.get("no_proxy")
    for name, own, other in (("NO_PROXY", upper, lower), ("no_proxy", lower, upper)):
        listed = (other or "") if own is None else own  # a new one would hide the other from clients that prefer it
        known = [host for part in listed.split(",") if (host := part.strip())]
        if "*" in known:  # nothing is asked for; urllib knows that word only where it stands alone
            environment[name] = listed
        else:
            environment[name] = ",".join([*known, *(host for host in _HOSTS if host not in known)])
