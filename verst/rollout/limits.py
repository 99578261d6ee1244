"""What an engine refuses to generate: the same limits and the same words in all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from verst.errors import EngineFailure
from verst.types import GenerateRequest


def check_request(request: GenerateRequest, vocab_size: int, max_tokens: int) -> None:
    """Raises `EngineFailure` if the prompt leaves no room for a token, holds ids outside the vocabulary, or the sampling is impossible."""
    sampling, where = request.sampling, f"request {request.id!r}"
    check_tokens(where, request.tokens_T, vocab_size, max_tokens - 1)
    if sampling.max_new_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise EngineFailure(f"{where}: needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got {sampling}")
    if sampling.top_k < 0 or not 0 <= sampling.min_p < 1:
        raise EngineFailure(f"{where}: needs top_k >= 0 and 0 <= min_p < 1, got {sampling}")


def check_tokens(where: str, tokens_T: NDArray[np.int32], vocab_size: int, limit: int) -> None:
    """Raises `EngineFailure` unless these are 1 to `limit` ids of the vocabulary; `where` names them."""
    if not 1 <= len(tokens_T) <= limit:
        raise EngineFailure(f"{where} has {len(tokens_T)} tokens, but 1 to {limit} fit the engine's max_model_tokens")
    if tokens_T.min() < 0 or tokens_T.max() >= vocab_size:
        raise EngineFailure(
            f"{where} has token ids from {tokens_T.min()} to {tokens_T.max()}, but the vocabulary has {vocab_size}: "
            "is the tokenizer that of the model?"
        )
