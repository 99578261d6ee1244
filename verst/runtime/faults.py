"""What was lost of a run and how it came back: told to a person, and kept in the journal."""

from __future__ import annotations

import time
from collections.abc import Callable

from verst.errors import first_line
from verst.journal.log import Journal
from verst.journal.records import FaultRecord, RecoveryRecord


class Faults:
    """Of one run. `role` names a process or several, such as "trainer rank 1"; `step` is the last one that is committed."""

    def __init__(self, journal: Journal, note: Callable[[str], None]) -> None:
        self._journal, self._note = journal, note
        self._held: list[FaultRecord | RecoveryRecord] | None = None
        self.count = 0
        """Losses since this process began."""

    def lost(self, role: str, step: int, error: BaseException, also: str = "") -> None:
        self.count += 1
        verb = "were" if role.endswith("trainers") else "was"
        self._note(f"{role} {verb} lost after step {step}{also}: {first_line(error)}")
        self._append(FaultRecord(role, str(error), step, time.time()))

    def recovered(self, role: str, step: int, source: str, seconds: float, line: str) -> None:
        """`source`: what it was restored from, such as "snapshot". `line`: what a person is told."""
        self._note(line)
        self._append(RecoveryRecord(role, step, source, seconds, time.time()))

    def failed(self, line: str) -> None:
        """An attempt to bring something back; or where more is written about a loss."""
        self._note(line)

    def hold(self) -> None:
        """Nothing goes into the journal until `write_held`: the first record cuts a torn end, which recovery has to see first."""
        self._held = []

    def write_held(self) -> None:
        held, self._held = self._held or [], None
        for record in held:
            self._append(record)

    def _append(self, record: FaultRecord | RecoveryRecord) -> None:
        if self._held is not None:
            self._held.append(record)
        elif isinstance(record, FaultRecord):
            self._journal.append_fault(record)
        else:
            self._journal.append_recovery(record)
