"""A generate function of slime: `rollout: {environment: "slime:from_slime:generate", max_turns: 3}`, started in this directory."""

from __future__ import annotations

from typing import Any

from slime.rollout.sglang_rollout import GenerateState  # pyright: ignore[reportMissingImports] - need not be installed
from slime.utils.http_utils import post  # pyright: ignore[reportMissingImports]
from slime.utils.types import Sample  # pyright: ignore[reportMissingImports]


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Up to three answers; each one that is not a number is followed by a remark."""
    encode = GenerateState(args).tokenizer
    sample.tokens = encode(sample.prompt, add_special_tokens=False)["input_ids"]
    for left in (2, 1, 0):
        payload = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
        output = await post(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate", payload)
        logprobs, tokens, _ = zip(*output["meta_info"]["output_token_logprobs"], strict=True)
        sample.append_response_tokens(
            args, tokens=list(tokens), log_probs=list(logprobs), meta_info=output["meta_info"], text=output["text"]
        )
        if sample.status == Sample.Status.TRUNCATED or output["text"].partition("<")[0].strip().isdigit() or not left:
            return sample
        remark = encode("\nA number, please.\n", add_special_tokens=False)["input_ids"]
        sample.append_response_tokens(args, tokens=remark, trainable=False)
    return sample
