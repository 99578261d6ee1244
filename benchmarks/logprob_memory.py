"""Peak memory of log-probabilities and their gradients at a real vocabulary: in chunks, against the bytes of whole logits.

    python benchmarks/logprob_memory.py [--tokens 32768] [--vocab 151936] [--hidden 1024]

On a GPU: bfloat16, memory as its allocator counts it, and the plain way (whole logits) beside it where that fits. On a CPU: float32,
growth of the process's resident memory (Linux), and unless given 8,192 tokens and hidden size 32, so that it ends within minutes.
Each measurement has a process of its own. The last line is one JSON object; sizes in bytes, times in seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verst.training.logprobs import CHUNK_BYTES, GPU_CHUNK_BYTES, GPU_KEPT_BYTES, token_logprobs

FLOAT32_BYTES = 4


def whole_logprobs(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The way it is usually written."""
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH).float()
    return torch.log_softmax(logits_NV, dim=-1).gather(1, targets_N[:, None]).squeeze(1)


def chunked_logprobs(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return token_logprobs(hidden_NH, weight_VH, targets_N)[0]


def measure(way: str, tokens: int, vocab: int, hidden: int) -> dict[str, float]:
    """Forward and backward in this process. `extra_bytes` is the peak beyond inputs and their gradients."""
    cuda = torch.cuda.is_available()
    kind = {"device": "cuda" if cuda else "cpu", "dtype": torch.bfloat16 if cuda else torch.float32}
    generator = torch.Generator(device=kind["device"]).manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, generator=generator, **kind).requires_grad_()
    weight_VH = (torch.randn(vocab, hidden, generator=generator, **kind) / hidden**0.5).requires_grad_()
    targets_N = torch.randint(vocab, (tokens,), generator=generator, device=kind["device"])
    function = chunked_logprobs if way == "chunked" else whole_logprobs
    function(hidden_NH[:64], weight_VH, targets_N[:64]).sum().backward()  # libraries load their work space; gradients come to exist
    before = held_bytes(cuda)
    started = time.perf_counter()
    logprobs_N = function(hidden_NH, weight_VH, targets_N)
    mean = logprobs_N.mean()
    forward_s = seconds_since(started, cuda)
    mean.backward()
    result = {"forward_s": forward_s, "total_s": seconds_since(started, cuda), "extra_bytes": peak_bytes(cuda) - before}
    return result | {"mean_logprob": mean.item()}


def held_bytes(cuda: bool) -> int:
    """Memory in use now; on a GPU the peak starts again from here."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_since(started: float, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_a_process(way: str, options: argparse.Namespace) -> dict[str, float] | None:
    """None if it ran out of memory."""
    sizes = ["--tokens", str(options.tokens), "--vocab", str(options.vocab), "--hidden", str(options.hidden)]
    command = [sys.executable, __file__, "--way", way, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"measuring the {way} way failed:\n{done.stderr}")
    return json.loads(done.stdout)


def report(options: argparse.Namespace, cuda: bool) -> None:
    whole_bytes = options.tokens * options.vocab * FLOAT32_BYTES
    chunked = in_a_process("chunked", options)
    if chunked is None:
        raise SystemExit("the chunked way ran out of memory; use fewer tokens or a smaller hidden size")
    whole = in_a_process("whole", options) if cuda else None  # on a CPU it would swap for minutes and prove nothing more
    print(f"{options.tokens:,} tokens × {options.vocab:,} words, hidden {options.hidden}: whole logits take {whole_bytes / 1e9:.2f} GB")
    for way, result in (("chunked", chunked), ("whole", whole)):
        if result:
            print(f"{way:>8}: {result['extra_bytes'] / 1e9:6.2f} GB beyond inputs and gradients, {result['total_s']:.2f} s")
        else:
            print(f"{way:>8}: {'out of memory' if cuda else 'not run on a CPU'}")
    settings = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
    settings |= {"chunk_bytes": GPU_CHUNK_BYTES if cuda else CHUNK_BYTES, "kept_bytes": GPU_KEPT_BYTES if cuda else 0}
    sizes = {"tokens": options.tokens, "vocab": options.vocab, "hidden": options.hidden, "whole_logits_bytes": whole_bytes}
    print(json.dumps({"benchmark": "logprob_memory"} | settings | sizes | {"chunked": chunked, "whole": whole}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=32768 if cuda else 8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024 if cuda else 32)
    parser.add_argument("--way", choices=["chunked", "whole"], help="measure one way in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.tokens, options.vocab, options.hidden)))
    else:
        report(options, cuda)


if __name__ == "__main__":
    main()
