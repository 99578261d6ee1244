"""Files that another process, perhaps on another machine, is appending to."""

from __future__ import annotations

from pathlib import Path


class LineTail:
    """The complete lines of a file, each once. A file that is not there yet has none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> list[str]:
        """The lines that were not read yet. One that is still being written is left for the next time."""
        try:
            with self._path.open("rb") as file:  # opened again each time: a shared disk shows what is new to those who open
                file.seek(self._position)
                new = file.read()
        except FileNotFoundError:
            return []
        whole, newline, _ = new.rpartition(b"\n")
        self._position += len(whole) + len(newline)
        return whole.decode("utf-8", errors="replace").split("\n") if newline else []
