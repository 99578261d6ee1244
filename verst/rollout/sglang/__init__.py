"""The `sglang` engine: an SGLang server, over HTTP. SGLang itself is imported only in the server's process."""

from verst.rollout.sglang.engine import SGLangEngine

__all__ = ["SGLangEngine"]
