"""What the commands share: their arguments, and how they print."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def command(commands: Any, name: str, about: str, *examples: str, detail: str = "") -> argparse.ArgumentParser:
    """A command with its help: what it does, more of it, and examples as they are typed."""
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples)
    return commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}." + (f"\n\n{detail}" if detail else ""),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def takes_run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="run file (YAML)")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="options that replace those of the file, such as train.lr=1e-5")


def takes_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", type=Path, help="the run's directory")


def takes_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def number_range(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    """A parser of `N` or `LOW:HIGH`, both ends included; either may be left out (None)."""

    def parse(text: str) -> tuple[Any, Any]:
        low, colon, high = text.partition(":")
        if not colon:
            return kind(text), kind(text)
        ends = (kind(low) if low else None, kind(high) if high else None)
        if ends[0] is not None and ends[1] is not None and not ends[0] <= ends[1]:
            raise argparse.ArgumentTypeError(f"{text!r} is empty: the lower end comes first")
        return ends

    parse.__name__ = f"{kind.__name__} range"  # what argparse calls it in its message
    return parse


def echo(line: str) -> None:
    print(line, flush=True)


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def quiet_libraries() -> None:
    """Keeps progress bars and notes of libraries that load or trace a model in this process out of a command's output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")


def width() -> int:
    """Columns to print: those of the terminal, unlimited where the output goes to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Aligned columns; those numbered in `right` to the right. The last one is cut where the terminal ends."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        line = "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append(clipped(line.rstrip(), width()))
    return lines


def clipped(text: str, columns: int) -> str:
    return text if len(text) <= columns else f"{text[: columns - 1]}…"


def one_line(text: str) -> str:
    """Text with its line breaks and control characters shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float | None, form: str = ".3f") -> str:
    """A figure, or `-` for one that is unknown."""
    return "-" if value is None else format(value, form)


def size(nbytes: float) -> str:
    """Bytes as people read them."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(nbytes).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{nbytes / 1024**power:.{1 if power else 0}f} {units[power]}"
