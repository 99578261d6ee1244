"""One row of what `verst doctor` tells, in plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: what was looked at, what is there, what was tested, and what to do if it is not right.

    `verdict`: "ok", "other" (works perhaps, was not tested), "absent" (needed only for some run files), "low" or "LACKING".
    """

    what: str
    found: str
    tested: str
    verdict: str
    advice: str = ""
