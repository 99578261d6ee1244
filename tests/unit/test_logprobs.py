"""Log-probabilities in chunks against torch's own log_softmax and autograd, by finite differences, and bit for bit."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from verst.training.logprobs import VocabularyShard, token_logprobs

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"scale": 0.25},
    {"temperature": 1.3, "softcap": 2.0, "scale": 0.5},
]
EIGHT_ROWS = 8 * 17 * 8  # bytes of eight rows of float64 logits over 17 words


def inputs(count=11, hidden=6, vocab=17, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(count, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets_N = torch.randint(vocab, (count,), generator=generator)
    return hidden_NH, weight_VH, bias_V, targets_N


def plain(hidden_NH, weight_VH, targets_N, *, bias=None, temperature=1.0, softcap=None, scale=1.0):
    """The same numbers with whole logits, by torch."""
    logits = torch.nn.functional.linear(hidden_NH, weight_VH, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logs = torch.log_softmax(logits / temperature, dim=-1)
    entropy = torch.distributions.Categorical(logits=logs.detach()).entropy()
    return logs.gather(1, targets_N[:, None]).squeeze(1), entropy


def gradients(function, tensors, targets_N, upstream_N, **options):
    hidden_NH, weight_VH, bias_V = tensors
    logprobs_N, _ = function(hidden_NH, weight_VH, targets_N, bias=bias_V, **options)
    return torch.autograd.grad((logprobs_N * upstream_N).sum(), tensors)


def test_worked_by_hand():
    # Hidden 1 and weights (ln 1, ln 2, ln 5): probabilities 1/8, 2/8, 5/8. Entropy = 3 ln 2/8·1 + 2 ln 2·2/8 − 5/8·ln(5/8).
    weight_VH = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    logprobs, entropy = token_logprobs(torch.ones(3, 1, dtype=torch.float64), weight_VH, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.125, 0.25, 0.625], dtype=torch.float64))
    expected = 3 * math.log(2) / 8 + 2 * math.log(2) * 2 / 8 - 5 / 8 * math.log(5 / 8)
    assert entropy.tolist() == pytest.approx([expected] * 3)
    # Temperature 1/2 squares them before normalising: 1, 4, 25 over 30.
    halved, _ = token_logprobs(torch.ones(1, 1, dtype=torch.float64), weight_VH, torch.tensor([1]), temperature=0.5)
    assert halved.exp().item() == pytest.approx(4 / 30)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kept_bytes", [0, EIGHT_ROWS, 2**20], ids=["none kept", "8 rows kept", "all kept"])
@pytest.mark.parametrize("chunk_bytes", [1, EIGHT_ROWS, 2**20], ids=["4 rows", "8 rows", "one chunk"])
def test_values_and_gradients_equal_plain_autograd_float64(options, chunk_bytes, kept_bytes):
    *tensors, targets_N = inputs()
    for result, expected in zip(
        token_logprobs(tensors[0], tensors[1], targets_N, bias=tensors[2], chunk_bytes=chunk_bytes, kept_bytes=kept_bytes, **options),
        plain(tensors[0], tensors[1], targets_N, bias=tensors[2], **options),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    upstream_N = torch.linspace(-2, 3, len(targets_N), dtype=torch.float64)
    mine = gradients(token_logprobs, tensors, targets_N, upstream_N, chunk_bytes=chunk_bytes, kept_bytes=kept_bytes, **options)
    for gradient, expected in zip(mine, gradients(plain, tensors, targets_N, upstream_N, **options), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


def test_float32_against_float64():
    *tensors, targets_N = inputs(count=300, hidden=64, vocab=501, dtype=torch.float32)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    logprobs_N, entropy_N = token_logprobs(tensors[0], tensors[1], targets_N, bias=tensors[2], chunk_bytes=40 * 501 * 4)
    expected_N, expected_entropy_N = plain(wide[0], wide[1], targets_N, bias=wide[2])
    assert logprobs_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(logprobs_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_N.double(), expected_entropy_N, rtol=1e-4, atol=1e-5)
    upstream_N = torch.ones(300)
    mine = gradients(token_logprobs, tensors, targets_N, upstream_N, chunk_bytes=40 * 501 * 4)
    for gradient, expected in zip(mine, gradients(plain, wide, targets_N, upstream_N.double()), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    hidden_NH, weight_VH, bias_V, targets_N = inputs(count=5, hidden=3, vocab=7)

    def logprobs(*tensors):
        return token_logprobs(tensors[0], tensors[1], targets_N, bias=tensors[2], chunk_bytes=1, **options)[0]

    assert torch.autograd.gradcheck(logprobs, (hidden_NH, weight_VH, bias_V))


def test_the_entropy_carries_no_gradient():
    hidden_NH, weight_VH, _, targets_N = inputs()
    logprobs_N, entropy_N = token_logprobs(hidden_NH, weight_VH, targets_N)
    assert logprobs_N.requires_grad
    assert not entropy_N.requires_grad


def test_tied_weights_collect_both_gradients():
    _, weight_VH, _, targets_N = inputs()
    words_N = torch.arange(len(targets_N))

    def gradient(function):
        hidden_NH = torch.tanh(torch.nn.functional.embedding(words_N, weight_VH))
        return torch.autograd.grad(function(hidden_NH, weight_VH, targets_N)[0].sum(), weight_VH)[0]

    torch.testing.assert_close(gradient(token_logprobs), gradient(plain), rtol=1e-11, atol=1e-12)


def test_only_wanted_gradients_are_made():
    hidden_NH, weight_VH, _, targets_N = inputs()
    frozen, _ = token_logprobs(hidden_NH, weight_VH.detach(), targets_N)
    frozen.sum().backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is None
    with torch.no_grad():
        assert not token_logprobs(hidden_NH, weight_VH, targets_N)[0].requires_grad


def test_bfloat16_weights_have_float32_logits_and_a_float32_sum():
    # 4,096 tokens in chunks of 4 rows. The reference is float64 over the very same bfloat16 values, so the only error
    # left to bfloat16 is the one rounding at the end: 2^-9 relative. A bfloat16 sum over 1,024 chunks would stall far off.
    hidden_NH, weight_VH, _, targets_N = inputs(count=4096, hidden=8, vocab=17, dtype=torch.bfloat16)
    logprobs_N, entropy_N = token_logprobs(hidden_NH, weight_VH, targets_N, chunk_bytes=1)
    wide = [t.detach().double().requires_grad_() for t in (hidden_NH, weight_VH)]
    expected_N, _ = plain(wide[0], wide[1], targets_N)
    assert logprobs_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(logprobs_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    grad_hidden, grad_weight = torch.autograd.grad(logprobs_N.sum(), (hidden_NH, weight_VH))
    expected = torch.autograd.grad(expected_N.sum(), wide)
    assert grad_weight.dtype == grad_hidden.dtype == torch.bfloat16
    torch.testing.assert_close(grad_weight.double(), expected[1], rtol=2**-8, atol=1e-2)
    torch.testing.assert_close(grad_hidden.double(), expected[0], rtol=2**-8, atol=1e-4)


def test_no_tokens_give_zero_gradients():
    hidden_NH, weight_VH, bias_V, targets_N = inputs(count=0)
    logprobs_N, entropy_N = token_logprobs(hidden_NH, weight_VH, targets_N, bias=bias_V)
    assert logprobs_N.shape == entropy_N.shape == (0,)
    gradient_H, gradient_V, gradient_b = torch.autograd.grad(logprobs_N.sum(), (hidden_NH, weight_VH, bias_V))
    assert gradient_H.shape == (0, 6)
    assert not gradient_V.any()
    assert not gradient_b.any()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that torch makes: every one passes through the dispatcher."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_logits_exists():
    hidden_NH, weight_VH, _, targets_N = inputs(count=256, hidden=4, vocab=1000)
    with Largest() as largest:
        token_logprobs(hidden_NH, weight_VH, targets_N, chunk_bytes=16 * 1000 * 8)[0].sum().backward()
    assert largest.elements == 16 * 1000


def test_what_is_kept_for_backward_fits_its_budget():
    hidden_NH, weight_VH, _, targets_N = inputs(count=256, hidden=4, vocab=1000)
    sizes: dict[str, Any] = {"chunk_bytes": 16 * 1000 * 8, "kept_bytes": 100 * 1000 * 8}
    with Largest() as largest:
        token_logprobs(hidden_NH, weight_VH, targets_N, **sizes)[0].sum().backward()
    assert largest.elements == 96 * 1000  # whole chunks
    with torch.no_grad(), Largest() as largest:
        token_logprobs(hidden_NH, weight_VH, targets_N, **sizes)
    assert largest.elements == 16 * 1000  # there is no backward


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_bits_of_a_row_do_not_depend_on_neighbours_or_chunks():
    *tensors, targets_N = inputs(count=70, hidden=64, vocab=503, dtype=torch.float32)
    hidden_NH, weight_VH = tensors[:2]
    ones_N = torch.ones(70)
    whole = token_logprobs(hidden_NH, weight_VH, targets_N)
    (whole_gradient,) = torch.autograd.grad(whole[0], hidden_NH, ones_N)
    for start, rows, chunk_rows in itertools.product((0, 5), (1, 2, 3, 5, 7, 9, 11, 17, 27), (1, 27, 1000)):
        own = slice(start, start + rows)
        part = token_logprobs(hidden_NH[own], weight_VH, targets_N[own], chunk_bytes=chunk_rows * 503 * 4)
        assert torch.equal(part[0], whole[0][own])
        assert torch.equal(part[1], whole[1][own])
        (gradient,) = torch.autograd.grad(part[0], hidden_NH, ones_N[own])
        assert torch.equal(gradient[own], whole_gradient[own])


def of_a_shard(rank, rendezvous, directory):
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    hidden_NH, weight_VH, bias_V, targets_N = inputs()
    own = (slice(0, 7), slice(7, 17))[rank]
    group: Any = torch.distributed.group.WORLD
    shard = VocabularyShard(group, own.start)
    parts = [hidden_NH, weight_VH.detach()[own].requires_grad_(), bias_V.detach()[own].requires_grad_()]
    found = []
    for kept_bytes in (0, 4 * 10 * 8, 2**20):
        options = {"chunk_bytes": 1, "kept_bytes": kept_bytes, "shard": shard, "temperature": 0.7, "softcap": 3.0}
        logprobs_N, entropy_N = token_logprobs(parts[0], parts[1], targets_N, bias=parts[2], **options)
        gradients = torch.autograd.grad((logprobs_N * torch.linspace(-2, 3, 11, dtype=torch.float64)).sum(), parts)
        found.append([t.detach() for t in (logprobs_N, entropy_N, *gradients)])
    torch.save(found, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_shards_of_the_vocabulary_equal_the_whole(tmp_path):
    spawn(of_a_shard, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    *tensors, targets_N = inputs()
    options = {"temperature": 0.7, "softcap": 3.0}
    expected = [t.detach() for t in plain(tensors[0], tensors[1], targets_N, bias=tensors[2], **options)]
    whole = gradients(plain, tensors, targets_N, torch.linspace(-2, 3, 11, dtype=torch.float64), **options)
    for left, right in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True):  # for each number of kept rows
        for own in (left, right):
            torch.testing.assert_close(own[:2], expected, rtol=1e-12, atol=1e-12)
        joined = [left[2] + right[2], torch.cat((left[3], right[3])), torch.cat((left[4], right[4]))]
        torch.testing.assert_close(joined, list(whole), rtol=1e-11, atol=1e-12)


def test_extreme_logits_stay_finite():
    # ±1e4: exp would overflow; the softmax is a point, so the log-probability is 0 or the difference, and the entropy 0.
    weight_VH = torch.tensor([[1e4], [-1e4]])
    logprobs_N, entropy_N = token_logprobs(torch.ones(2, 1), weight_VH, torch.tensor([0, 1]))
    assert logprobs_N.tolist() == [0.0, -2e4]
    assert entropy_N.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_sampling_has_no_log_probabilities(temperature):
    hidden_NH, weight_VH, _, targets_N = inputs()
    with pytest.raises(ValueError, match="temperature is"):
        token_logprobs(hidden_NH, weight_VH, targets_N, temperature=temperature)


def test_misfits_are_named():
    hidden_NH, weight_VH, _, targets_N = inputs()
    with pytest.raises(ValueError, match=r"float64.*float32"):
        token_logprobs(hidden_NH, weight_VH.float(), targets_N)
    with pytest.raises(ValueError, match=r"\(11, 5\).*\(17, 6\)"):
        token_logprobs(hidden_NH[:, :5], weight_VH, targets_N)


KERNELS = """
import torch
from verst.exact import logprob_kernels
from verst.exact.head import row_sums
from verst.training import logprobs

generator = torch.Generator().manual_seed(1)
logits_CV = 6 * torch.randn(5, 4999, generator=generator)  # two blocks and a part of a third
logits_CV[1] += 3e4  # far from 0
logits_CV[2, 4998] = 500.0  # one word has it all
targets_C = torch.tensor([0, 4998, 4998, -3, 4999])  # the last two are another shard's
head = logprobs._Head(temperature=1 / 0.7, softcap=None, scale=1.0, rows=5, kept=0, multiple=1, shard=None, exact=False)
sums = logprob_kernels.row_sums(logits_CV, targets_C, 0.7), row_sums(logits_CV, targets_C, 0.7)
torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)
lse_C = torch.logsumexp(0.7 * logits_CV.double(), dim=1).float()
found, expected = torch.empty(2, 5, 4999, dtype=torch.bfloat16)
logprob_kernels.slope(logits_CV, lse_C, targets_C, 0.7, found)
logprobs._slope(logits_CV.clone(), lse_C, targets_C, head, expected)
torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-7)
assert found[[0, 1, 3, 4]].abs().sum(dim=1).min() > 0.1
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_of_a_gpu_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when a kernel is defined
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, done.stderr
