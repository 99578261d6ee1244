"""The order in which prompts are admitted: shuffled without reading the source whole, and resumable after any prompt.

An epoch is a seeded permutation of the source's blocks, cut into windows of `window_blocks`; the rows of a window are shuffled together.
Everything follows from (seed, epoch, window), so a cursor of three numbers is the whole state and a stream holds one window in memory.
With a curriculum the number of prompts given is a fourth: it alone says how difficult the next one may be.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Literal

from verst.config.schema import CurriculumConfig, DataConfig
from verst.data.prompts import split_point, text_hash, to_prompt
from verst.data.sources import Row, Source, nearest
from verst.errors import DataError
from verst.types import Prompt

Split = Literal["train", "eval"]

_PATIENCE = 1000
"""A generated prompt falls on a side of the split of share s once in 1/s rows. After this many times 1/s rows without one, chance is out
of the question: the task has too few different prompts."""


class PromptStream:
    """Prompts without end from a source: epoch after epoch, each in another order (in the source's order without `data.shuffle`).

    `split` "train" leaves out the share `data.holdout` of prompts, "eval" yields only them; both go by the prompt's text, so no text is
    ever on both sides. Sources that cannot be read by block (iterables) keep their own order.
    """

    def __init__(self, source: Source, data: DataConfig, seed: int, split: Split = "train") -> None:
        self._source, self._data, self._seed, self._split = source, data, seed, split
        self._epoch = self._window = self._row = 0  # the cursor: `_row` rows of this window are consumed
        self._given = 0  # prompts; a part of the cursor too
        self._rows: Sequence[Row] | None = None  # of the current window; None: not read yet
        self._share = data.holdout if split == "eval" else 1 - data.holdout
        if not self._share:
            raise DataError("data.holdout is 0, so no prompt is held out for evaluation: set the share to hold out, for example 0.05")

    def next(self) -> Prompt:
        """The next prompt. Raises `DataError` if a row is malformed, a one-shot iterator ended, or this side of the split has no prompt."""
        passed, epoch = 0, self._epoch
        while True:
            rows = self._load()
            while self._row < len(rows):
                prompt = to_prompt(row := rows[self._row], self._data)
                self._row += 1
                if self._wanted(prompt) and self._easy_enough(prompt, row):
                    self._given += 1
                    return prompt
                passed += 1
            self._advance()
            # Having been through one epoch in full takes the rest of the first and a second one.
            if self._epoch > epoch + 1 or (self._source.unlimited and passed > _PATIENCE / self._share):
                raise self._no_prompt(passed)

    def state(self) -> dict[str, Any]:
        """The cursor, and what it is valid for, in JSON values."""
        return {"epoch": self._epoch, "window": self._window, "row": self._row, "given": self._given, "of": self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues after the prompts that were taken when `state` was saved. Raises `DataError` if source or options differ from then."""
        saved, now = state["of"], self._identity()
        changed = [f"{name} was {saved.get(name)}, is {value}" for name, value in now.items() if saved.get(name) != value]
        if changed:
            raise DataError(
                f"the saved position in {self._source.name} does not fit: {'; '.join(changed)}. Give the data it was saved with"
            )
        self._epoch, self._window, self._row = state["epoch"], state["window"], state["row"]
        self._given = state.get("given", 0)  # not in states of before there were curricula
        self._rows = None

    def _identity(self) -> dict[str, Any]:
        options = {"seed": self._seed, "shuffle": self._data.shuffle, "holdout": self._data.holdout, "split": self._split}
        if self._data.curriculum is not None:
            options["curriculum"] = self._data.curriculum.model_dump()
        return {"source": dict(self._source.fingerprint()), **options}

    def _wanted(self, prompt: Prompt) -> bool:
        return (split_point(prompt, self._data) < self._data.holdout) == (self._split == "eval")

    def _easy_enough(self, prompt: Prompt, row: Row) -> bool:
        """By the curriculum; evaluation has none. Competence-based curriculum learning, arXiv 1903.09848, its linear competence."""
        curriculum = self._data.curriculum
        if curriculum is None or self._split == "eval":
            return True
        difficulty = prompt.fields.get(curriculum.field)
        if isinstance(difficulty, bool) or not isinstance(difficulty, int | float):
            raise DataError(
                f"{row.locate()}: data.curriculum needs a number in the field {curriculum.field!r}, which is {difficulty!r:.40}"
                f"{nearest(curriculum.field, prompt.fields)}"
            )
        return difficulty <= most_difficult(curriculum, self._given)

    def _load(self) -> Sequence[Row]:
        if self._rows is None:
            self._rows = self._read_window()
        return self._rows

    def _advance(self) -> None:
        self._rows, self._row = None, 0
        self._window += 1
        count = self._source.num_blocks
        if count is not None and self._window == math.ceil(count / self._window_blocks):
            self._epoch, self._window = self._epoch + 1, 0

    @property
    def _window_blocks(self) -> int:
        return self._source.window_blocks if self._data.shuffle else 1

    def _read_window(self) -> Sequence[Row]:
        if self._source.num_blocks is None:
            return self._read_in_order()
        first = self._window * self._window_blocks
        blocks = range(first, min(first + self._window_blocks, self._source.num_blocks))
        if not self._data.shuffle:
            return [row for block in blocks for row in self._source.read_block(block) or ()]
        order = Permutation(self._source.num_blocks, f"{self._seed}:{self._epoch}")
        rows = [row for block in blocks for row in self._source.read_block(order(block)) or ()]
        Random(f"{self._seed}:{self._epoch}:{self._window}").shuffle(rows)
        return rows

    def _read_in_order(self) -> Sequence[Row]:
        rows = self._source.read_block(self._window)
        if rows is not None:
            return rows
        if not self._window:
            raise DataError(f"{self._source.name} yields no row: give at least one prompt")
        self._epoch, self._window, self._row = self._epoch + 1, 0, 0
        return self._source.read_block(0) or ()

    def _no_prompt(self, passed: int) -> DataError:
        if not passed:
            return DataError(f"{self._source.name} has no row: give at least one prompt")
        curriculum = self._data.curriculum
        if curriculum is not None and self._split == "train":
            return DataError(
                f"none of {passed} rows of {self._source.name} is as easy as data.curriculum has it after {self._given} prompts: "
                f"{curriculum.field} up to {most_difficult(curriculum, self._given):g}. Raise data.curriculum.start, or give easier prompts"
            )
        return DataError(
            f"none of {passed} rows of {self._source.name} is on the {self._split} side of data.holdout={self._data.holdout}: "
            "the prompts are too few or too alike; change data.holdout or give more different prompts"
        )


def most_difficult(curriculum: CurriculumConfig, given: int) -> float:
    """The limit of difficulty after so many prompts."""
    return curriculum.start + (curriculum.end - curriculum.start) * min(given / curriculum.prompts, 1.0)


def eval_prompts(source: Source, data: DataConfig, n: int) -> list[Prompt]:
    """The first `n` different held-out prompts, in the source's own order: the same for every seed.

    Raises `DataError` if the source has fewer, or (a generated task) if a scan of many times the rows expected did not find them.
    """
    if not data.holdout:
        raise DataError("data.holdout is 0, so no prompt is held out for evaluation: set the share to hold out, for example 0.05")
    if not source.rereadable:
        raise DataError("evaluation prompts cannot be taken from a one-shot iterator: training would miss its rows. Give a list")
    found, scanned = distinct_prompts(source, data, n, share=data.holdout)
    if len(found) < n:
        raise DataError(
            f"{n} different held-out prompts wanted, {len(found)} found in {scanned} rows of {source.name} at data.holdout={data.holdout}: "
            "lower eval.prompts, raise data.holdout, or give more different prompts"
        )
    return found


def distinct_prompts(source: Source, data: DataConfig, n: int, *, share: float) -> tuple[list[Prompt], int]:
    """Up to `n` different prompts of the held-out `share` (1: of all), in the source's own order, and how many rows were read for them."""
    found: dict[str, Prompt] = {}
    limit = (n + _PATIENCE) / share * 2 if source.unlimited else math.inf
    scanned, block = 0, 0
    while scanned < limit and (source.num_blocks is None or block < source.num_blocks):
        rows = source.read_block(block)
        if rows is None:
            break
        for row in rows:
            prompt = to_prompt(row, data)
            if split_point(prompt, data) < share:
                found.setdefault(text_hash(prompt, data), prompt)
            if len(found) == n:
                return list(found.values()), scanned
        scanned, block = scanned + len(rows), block + 1
    return list(found.values()), scanned


class Permutation:
    """A seeded permutation of range(n) in constant memory: a Feistel network over the next even power of two, walked back into range.

    Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988: four rounds suffice.
    """

    def __init__(self, n: int, seed: str) -> None:
        self._n = n
        self._half_bits = max(1, math.ceil((n - 1).bit_length() / 2))
        self._keys = [f"{seed}:{i}".encode() for i in range(4)]

    def __call__(self, index: int) -> int:
        """Where `index` goes. The network maps at most 4 n numbers, so few walks leave the range for long."""
        index = self._network(index)
        while index >= self._n:
            index = self._network(index)
        return index

    def _network(self, index: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = index >> self._half_bits, index & mask
        for key in self._keys:
            digest = hashlib.blake2b(right.to_bytes(8, "big"), key=key[:64], digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        return (left << self._half_bits) | right
