"""Stop strings: found in the decoded tail of a generation after each token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from verst.errors import ModelError

_MARGIN_TOKENS = 8  # a tail may open inside a character or lose its leading space; a match must not depend on that


class StopStrings:
    """Loads the model's tokenizer at once. Raises `ModelError` if there is none."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer  # only a request with stop strings pays for the import and the load

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"stop strings need a tokenizer, and {path} has none that loads: {error}") from error

    def end(self, tokens_T: NDArray[np.int32], stop: tuple[str, ...]) -> bool:
        """Whether the newest token completed one of the strings. Asked after each token, so only the tail is decoded."""
        # Every token that shows has at least one byte, so a string of n bytes began at most n tokens ago.
        tail = max(len(text.encode()) for text in stop) + _MARGIN_TOKENS
        text = self._tokenizer.decode(tokens_T[-tail:].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in stop)
