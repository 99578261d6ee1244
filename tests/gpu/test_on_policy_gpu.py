"""On a GPU, too, trainer minus behaviour log-probability is 0 for every token of the embedded pair, and the kernels say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from tests.contracts.engine_cases import hf_engine
from tests.contracts.on_policy_cases import first_differences, requests, sampled, save_with_tokenizer, trained

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # of drivers and the compiler
]
SIZES: dict[str, Any] = {
    "vocab_size": 5003,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 63,
    "pad_token_id": None,
    "initializer_range": 0.05,
}
MODELS = {
    "heads_of_64": Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),
    "heads_of_128": Qwen3Config(**SIZES, head_dim=128),
    "windows": Qwen3Config(**SIZES, head_dim=64, use_sliding_window=True, sliding_window=37, max_window_layers=1),
}


@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": True, "microbatch_tokens": 4096}], ids=["plain", "recompute"])
@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in MODELS), ("heads_of_64", "float32")])
async def test_every_sampled_token_has_the_trainers_log_probability(tmp_path: Path, name: str, dtype: str, train: dict[str, Any]) -> None:
    path = save_with_tokenizer(tmp_path, MODELS[name])
    engine = hf_engine(path, dtype=dtype, device="cuda", max_running=16, threads=None)
    await engine.start()
    samples = await sampled(engine, requests(0.8))
    await engine.close()
    _, report = trained(path, samples, 0.8, device="cuda", dtype=dtype, **train)
    longest = max(samples, key=lambda sample: len(sample.tokens_T))
    if report["mismatch/abs_max"] != 0.0:
        where = first_differences(path, longest.tokens_T, device="cuda", dtype=dtype)
        pytest.fail(f"largest difference {report['mismatch/abs_max']:.2e}, mean {report['mismatch/abs_mean']:.2e}; {where}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inner", "columns"), [(64, 96), (512, 1536), (1000, 5003), (4096, 1024)])
def test_a_products_rows_do_not_depend_on_how_many_there_are(dtype: torch.dtype, inner: int, columns: int) -> None:
    """Whatever the tile: the smaller one is for up to 256 rows."""
    from verst.exact.linear_kernels import invariant_product

    generator = torch.Generator("cuda").manual_seed(0)
    left, right = (torch.randn(n, inner, generator=generator, device="cuda").to(dtype) for n in (3000, columns))
    every = invariant_product(left, right, torch.float32)
    torch.testing.assert_close(every.double(), left.double() @ right.double().t(), rtol=1e-4, atol=1e-3 * inner**0.5)
    for rows in (1, 2, 16, 63, 64, 200, 256, 257, 1000, 2999):
        found = invariant_product(left[3000 - rows :], right, torch.float32)
        assert torch.equal(found, every[3000 - rows :]), f"{rows} rows differ by {(found - every[3000 - rows :]).abs().max().item():.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "window"), [(64, None), (128, None), (64, 100), (80, None)])
def test_attention_of_a_new_token_is_that_of_the_whole_sequence(dtype: torch.dtype, dim: int, window: int | None) -> None:
    from verst.exact.attention_kernels import causal_forward, newest_forward

    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (torch.randn(3, heads, 700, dim, generator=generator, device="cuda").to(dtype) for heads in (8, 2, 2))
    whole = causal_forward(query, key, value, dim**-0.5, window)
    for place in (0, 1, 63, 64, 100, 311, 699):
        filled = torch.tensor([place] * 3, device="cuda")
        newest = newest_forward(query[:, :, place].reshape(3, 2, 4, dim), key, value, filled, dim**-0.5, window)
        assert torch.equal(newest.reshape(3, 8, dim), whole[:, place]), f"position {place}"
    length = 333
    shorter = causal_forward(query[1:, :, :length], key[1:, :, :length], value[1:, :, :length], dim**-0.5, window)
    assert torch.equal(shorter, whole[1:, :length])
