"""`verst doctor`: this machine against the version sets that the suites passed on, and against what a run needs of it.

Reads package metadata and files of the system; imports none of the packages it looks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verst.doctor.findings import Finding
from verst.doctor.gpus import gpu_findings, list_gpus
from verst.doctor.machine import machine_findings
from verst.doctor.network import network_findings
from verst.doctor.packages import VersionSet, nearest_set, package_findings, python_finding, version_sets


@dataclass(frozen=True, slots=True)
class Examination:
    """All rows about a machine."""

    nearest: VersionSet
    findings: Sequence[Finding]

    @property
    def lacking(self) -> list[Finding]:
        """Those without which nothing runs."""
        return [finding for finding in self.findings if finding.verdict == "LACKING"]

    def lines(self) -> list[str]:
        """The table, then what to do."""
        rows = [("", "found", "tested", ""), *((f.what, f.found, f.tested, f.verdict) for f in self.findings)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        table = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        advice = list(dict.fromkeys(f"{f.what}: {f.advice}" for f in self.findings if f.advice))
        about = f"compared with the set {self.nearest.name}, on which passed: {self.nearest.passed}"
        return [about, *table, *(["to do:", *(f"  {line}" for line in advice)] if advice else ["nothing to do"])]

    def described(self) -> dict[str, Any]:
        """As JSON values."""
        compared = {"set": self.nearest.name, "passed": self.nearest.passed}
        return {"compared": compared, "findings": [asdict(finding) for finding in self.findings], "lacking": len(self.lacking)}


def examine() -> Examination:
    """Looks at this machine. Takes well under five seconds, also where a command hangs."""
    gpus, driver_cuda = list_gpus()
    nearest = nearest_set([s for s in version_sets() if s.gpu == bool(gpus)])
    findings = [python_finding(nearest), *package_findings(nearest), *gpu_findings(gpus, driver_cuda)]
    return Examination(nearest, [*findings, *machine_findings(gpu=bool(gpus)), *network_findings()])
