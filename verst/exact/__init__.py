"""Arithmetic that engine and trainer share in deterministic mode, so that both give a token the same log-probability, to the bit.

Every function here is batch-invariant: the bits of a row depend on that row alone (of attention: on its own query, keys and values),
not on how many rows, queries or padding stand beside it. Decoding one token, a prefill, and a packed training forward then agree.
"""
