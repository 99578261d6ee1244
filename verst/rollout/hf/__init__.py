"""The `hf` engine: in-process decoding of a transformers causal language model, on a CPU or one GPU."""

from verst.rollout.hf.engine import HFEngine

__all__ = ["HFEngine"]
