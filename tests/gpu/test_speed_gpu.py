"""What training on a GPU does for speed changes no number: compiled layers, packed flash attention, fused log-probabilities."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.unit.fsdp_cases import make_config, train
from verst.config.schema import Config
from verst.observe.metrics import Tally
from verst.protocols import TrainBackend
from verst.training.backends import make_backend
from verst.training.logprobs import token_logprobs
from verst.types import Batch, Sample

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),  # of drivers and the compiler
]
BACKENDS = [
    "fsdp",
    pytest.param("megatron", marks=pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")),
]
VOCABULARY, LONGEST = 5003, 300  # neither a multiple of a kernel's block


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen3 whose heads flash attention takes, with logits of a spread of about 0.6: bfloat16 noise then stays below a hundredth."""
    path = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(3)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64, "initializer_range": 0.04}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **sizes, **heads)).save_pretrained(path)
    Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0")).save(str(path / "tokenizer.json"))
    return str(path)


def batch_of(step: int, *, even: bool = False, count: int = 6) -> Batch:
    rng = np.random.default_rng(step)
    samples = []
    for index in range(count):
        length = 257 if even else int(rng.integers(LONGEST // 3, LONGEST + 1))
        mask_T = np.arange(length) > 2
        tokens_T, behaviour_T = rng.integers(0, VOCABULARY, length, dtype=np.int32), np.where(mask_T, -8.5, 0.0).astype(np.float32)
        versions_T = np.where(mask_T, step - 1, -1).astype(np.int32)
        samples.append(Sample(f"{index}/0", index, tokens_T, mask_T, behaviour_T, versions_T, float(index % 2)))
    return Batch(step, tuple(range(count)), tuple(samples))


def built(path: str, backend: str, *, compiled: bool, deterministic: bool = True) -> tuple[TrainBackend, Config]:
    torch.use_deterministic_algorithms(False)  # what an earlier backend of this process set; cuDNN's attention runs only without it
    options: dict[str, Any] = {"backend": backend, "compile": compiled, "microbatch_tokens": 3 * LONGEST, "lr": 1e-6, "clip_norm": 1.0}
    config = make_config(
        path,
        model={"dtype": "bfloat16"},
        rollout={"temperature": 1.0, "max_new_tokens": LONGEST - 4},
        train=options,
        run={"steps": 20, "deterministic": deterministic},
    )
    return make_backend(config, rank=0, world=1, device="cuda"), config


def steps(backend: TrainBackend, config: Config, batches: list[Batch]) -> list[Tally]:
    advantages = [1.0 if index % 2 else -1.0 for index in range(len(batches[0].samples))]
    return train(backend, config, batches, advantages=advantages)


def of_transformers(path: str, batch: Batch, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probability of each token but the first, from whole float32 logits, without anything of ours. The weights are bfloat16's."""
    reference: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")
    reference = reference.to(dtype).cuda().eval()
    found = []
    for sample in batch.samples:
        tokens = torch.from_numpy(sample.tokens_T.astype(np.int64)).cuda()
        with torch.no_grad():
            logs = reference(input_ids=tokens[None, :-1]).logits[0].float().log_softmax(dim=-1)
        found.append(logs.gather(1, tokens[1:, None])[:, 0].cpu())
    return found


@pytest.mark.parametrize(
    ("compiled", "deterministic"), [(False, True), (True, True), (True, False)], ids=["plain", "compiled", "compiled and fastest"]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_log_probabilities_and_losses_are_those_of_transformers(model: str, name: str, compiled: bool, deterministic: bool) -> None:
    backend, config = built(model, name, compiled=compiled, deterministic=deterministic)
    for step, even in ((1, False), (2, True)):  # sequences of one length have a kernel of their own
        batch = batch_of(step, even=even)
        expected = of_transformers(model, batch, torch.float32)
        if step == 1:  # the weights are still those of the files
            rounded = of_transformers(model, batch, torch.bfloat16)
            for sample, logprobs, other in zip(batch.samples, expected, rounded, strict=True):
                found = torch.from_numpy(backend.logprobs(sample.tokens_T)[1:])
                # Compiled layers round at other places, so what is compared is the distance from the exact values.
                assert (found - logprobs).abs().mean() <= 1.2 * (other - logprobs).abs().mean() <= 1.2e-2
        report = steps(backend, config, [batch])[0].report()
        # What transformers would see; one update of 1e-6 moves no log-probability by as much as is allowed.
        mismatch = torch.cat([(e[2:] + 8.5).abs() for e in expected]).mean().item()
        assert report["mismatch/abs_mean"] == pytest.approx(mismatch, abs=1e-2)
        assert report["policy/ratio"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_layers_train_as_plain_ones(model: str, name: str) -> None:
    batches = [batch_of(step) for step in range(1, 7)]
    reports = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        backend, config = built(model, name, compiled=compiled)
        reports.append([tally.report() for tally in steps(backend, config, batches)])
    # Lengths differ in every one of 12 microbatches; the graphs are made once.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    for plain, fast in zip(*reports, strict=True):
        assert fast["loss/total"] == pytest.approx(plain["loss/total"], abs=1e-2)
        assert fast["mismatch/abs_mean"] == pytest.approx(plain["mismatch/abs_mean"], abs=1e-2)
        assert fast["policy/entropy"] == pytest.approx(plain["policy/entropy"], abs=1e-2)
        assert fast["update/grad_norm"] == pytest.approx(plain["update/grad_norm"], rel=2e-2)


@pytest.mark.parametrize("kept_bytes", [0, 1024 * VOCABULARY * 2, 2**30], ids=["none kept", "some kept", "all kept"])
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 3.0, "scale": 2.0}], ids=["temperature", "softcap"])
def test_fused_log_probabilities_against_float64(options: dict[str, Any], kept_bytes: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden_NH = torch.randn(3001, 128, generator=generator).bfloat16()
    weight_VH = (torch.randn(VOCABULARY, 128, generator=generator) / 128**0.5).bfloat16()
    targets_N, upstream_N = torch.randint(VOCABULARY, (3001,), generator=generator), torch.randn(3001, generator=generator)
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        hidden, weight = (t.to(device, dtype).requires_grad_() for t in (hidden_NH, weight_VH))
        logprobs, entropy = token_logprobs(hidden, weight, targets_N.to(device), kept_bytes=kept_bytes, **options)
        gradients = torch.autograd.grad((logprobs * upstream_N.to(logprobs)).sum(), (hidden, weight))
        results.append([t.detach().double().cpu() for t in (logprobs, entropy, *gradients)])
    (logprobs, entropy, *gradients), found = results
    torch.testing.assert_close(found[0], logprobs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], entropy, rtol=1e-5, atol=1e-4)
    for mine, exact in zip(found[2:], gradients, strict=True):  # each factor of a product was rounded to bfloat16
        assert (mine - exact).norm() <= 5e-3 * exact.norm()


def test_packed_attention_is_that_of_each_sequence_alone() -> None:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    from verst.training.megatron import compat

    compat.require()
    from verst.training.megatron.specs import flash_packed

    generator = torch.Generator(device="cuda").manual_seed(7)
    lengths = (1, 130, 77, 256)
    q, k, v = (torch.randn(sum(lengths), heads, 64, generator=generator, device="cuda").bfloat16().requires_grad_() for heads in (4, 2, 2))
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    upstream = torch.randn(sum(lengths), 4, 64, generator=generator, device="cuda").bfloat16()
    found = flash_packed(q, k, v, ends, max(lengths), 0.125)
    mine = torch.autograd.grad(found, (q, k, v), upstream)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    parts = []
    for one in zip(*(t.split(lengths) for t in wide), strict=True):
        a, b, c = (t.transpose(0, 1)[None] for t in one)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, scale=0.125, enable_gqa=True)[0].transpose(0, 1)
        )
    expected = torch.cat(parts)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    for own, exact in zip(mine, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert (own.double() - exact).norm() <= 1e-2 * exact.norm()
