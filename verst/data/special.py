"""Special tokens that stand in the text of a message: they stay text.

A template writes special tokens between messages, and a tokenizer cannot tell those from the same characters in a message. What an
environment echoes of a completion, or a prompt quotes, could so end its message and open another one, of the system for example. So
before a template sees a message, such characters are replaced by marks, and each mark is then encoded as ordinary tokens.

Some tokenizers have tokens between messages that are added and not called special, such as `<｜User｜>` of DeepSeek's: who hides a message
names those too.
"""

from __future__ import annotations

import re
from collections.abc import Set
from functools import lru_cache
from typing import TYPE_CHECKING

from verst.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "Verst9b1fSpecial{}End"
"""No spaces, so that a template that trims keeps it. Where a message has one itself, it becomes the text of that special token, no more."""


class SpecialText:
    """The added tokens of one tokenizer, of which the special ones are always hidden: others, such as `<think>`, are what a model says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}.union(tokenizer.all_special_tokens) - {""}
        self._tokenizer = tokenizer
        self._added = frozenset(special.union(token.content for token in added) - {""})
        self._texts = sorted(self._added)
        self._number = {text: number for number, text in enumerate(self._texts)}
        self._found = lru_cache(maxsize=8)(lambda also: _one_of(special | also))
        self._marks = re.compile(_MARK.format(r"(\d+)"))
        self._as_texts = self._each_as_text()

    def written(self, text: str) -> frozenset[str]:
        """The added tokens, special or not, that a text has; but not blanks (Gemma's line feeds) and single letters, which are text."""
        return frozenset(token for token in _one_of(self._added).findall(text) if len(token.strip()) > 1)

    def hide(self, text: str, also: Set[str] = frozenset()) -> str:
        """Text for a template, with marks in the place of special tokens, and of the added ones in `also`."""
        return self._found(frozenset(also)).sub(lambda found: _MARK.format(self._number[found[0]]), text)

    def encode(self, text: str) -> list[int]:
        """The tokens of what a template wrote. Raises `DataError` if the tokenizer can write a special token in no other way."""
        pieces = self._marks.split(text)
        tokens = self._plain(pieces[0])
        for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
            tokens += self._as_text(int(number)) + self._plain(after)
        return tokens

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)  # the template writes the special tokens itself

    def _as_text(self, number: int) -> list[int]:
        if not self._texts:  # nothing was hidden: a message has the mark itself
            return self._plain(_MARK.format(number))
        number = min(number, len(self._texts) - 1)
        tokens = self._as_texts[number]
        if tokens is None:
            text = self._texts[number]
            raise DataError(f"a message has {text!r} in its text, which this tokenizer can write as a special token only: remove it")
        return tokens

    def _each_as_text(self) -> list[list[int] | None]:
        """Of each added token; None for one that can be written in no other way.

        All of them before another thread has this tokenizer: it has one switch for all who use it, and would split their special tokens.
        """
        found: list[list[int] | None] = []
        split = self._tokenizer(self._texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if self._texts else []
        for text, tokens in zip(self._texts, split, strict=True):
            token = self._tokenizer.convert_tokens_to_ids(text)
            if token in tokens:  # one that is not special is only split by hand
                tokens = self._plain(text[:1]) + self._plain(text[1:])
            found.append(None if token in tokens else tokens)
        self._plain("")  # turns the switch back
        return found


def _one_of(texts: Set[str]) -> re.Pattern[str]:
    """The longest first: of two that begin alike a tokenizer takes that one."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or r"(?!)")
