"""Generate functions of slime and Miles (`--custom-generate-function-path`), as they are: `rollout.environment: slime:module:function`.

`async def generate(args, sample, sampling_params)` posts token ids to `args.sglang_router_ip`, port `args.sglang_router_port`, and returns
the sample with its tokens and loss mask. Here the address is the trajectory's own (`verst.rollout.generate_endpoint`). What is trained are
the tokens that it answered: a sample whose mask trains others has failed, and so has one whose tokens are others.
https://github.com/THUDM/slime/blob/main/docs/en/get_started/customization.md
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from verst import extend
from verst.data.chat import ChatRenderer
from verst.data.prompts import same_beginning
from verst.errors import ExtensionError
from verst.rollout.generate_endpoint import HOST, GenerateEndpoint
from verst.rollout.rollouts import Rollouts
from verst.rollout.tokens import Rolling, TokenSession
from verst.rollout.user_loop import across
from verst.slime_api import GENERATED, label_of, make_arguments, metadata_of, sample_class
from verst.types import Prompt

EXPECTED = "async def generate(args, sample, sampling_params) -> Sample"
_OPTIONS = "rollout.environment_options"


class SlimeRollouts(Rollouts):
    """A rollout function made of a generate function. `options` are attributes of its `args`; `apply_chat_template` (true) as in slime.

    Raises `ExtensionError` with the signature expected.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        try:
            signature = inspect.signature(function)
            self._more = {"evaluation": False} if "evaluation" in signature.parameters else {}
            signature.bind("args", "sample", "sampling_params", **self._more)
        except TypeError as error:
            raise ExtensionError(f"generate function {name} cannot be called as slime calls it: {error}; expected: {EXPECTED}") from error
        if not extend.is_async(function):
            raise ExtensionError(f"generate function {name} is no `async def`; expected: {EXPECTED}")
        self._generate, self._given = function, options
        super().__init__(self._roll)
        self.title = f"generate function {name}"

    async def _roll(self, session: TokenSession, prompt: Prompt) -> Mapping[str, Any]:
        endpoint = await across(GenerateEndpoint.start(session), session.home)  # so a function that blocks its own loop has its answer
        args = make_arguments(_OPTIONS, {**_arguments(session.rolling, endpoint.port), **self._given})
        sample = _sample(prompt, session.rolling.renderer, self._given)
        before = set(vars(sample)), json.dumps(sample.metadata, default=repr)
        returned = await self._generate(args, sample, _sampling(session.rolling), **self._more)
        _take(_one(returned), session)
        info = _left(_one(returned), *before)
        return info | ({"not_heeded": sorted(endpoint.not_heeded)} if endpoint.not_heeded else {})


# ---- what they are given


def _arguments(rolling: Rolling, port: int) -> dict[str, Any]:
    sampling = rolling.sampling
    return {
        "sglang_router_ip": HOST,
        "sglang_router_port": port,
        "hf_checkpoint": rolling.renderer.tokenizer.name_or_path,
        "rollout_max_response_len": sampling.max_new_tokens,
        "rollout_max_context_len": rolling.max_model_tokens,
        "rollout_temperature": sampling.temperature,
        "rollout_top_p": sampling.top_p,
        "rollout_top_k": sampling.top_k or -1,
        "rollout_stop": list(sampling.stop) or None,
        "rollout_stop_token_ids": None,
        "rollout_skip_special_tokens": False,
        "n_samples_per_prompt": rolling.group_size,
        "partial_rollout": False,
        "use_rollout_routing_replay": False,  # routes are recorded without it
        "use_slime_router": False,
        "sglang_speculative_algorithm": None,
        "sglang_enable_deterministic_inference": False,
        "ci_test": False,
        "group_rm": False,
        "reward_key": None,
        "apply_chat_template": True,
    }


def _sampling(rolling: Rolling) -> dict[str, Any]:
    """slime's dict, of the run."""
    sampling = rolling.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }


def _sample(prompt: Prompt, renderer: ChatRenderer, options: Mapping[str, Any]) -> Any:
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    text: Any = prompt.messages[0].content if len(messages) == 1 else messages
    if options.get("apply_chat_template", True):
        text = renderer.tokenizer.decode(renderer.opening(prompt.messages).tolist(), clean_up_tokenization_spaces=False)
    return sample_class()(prompt=text, label=label_of(prompt.fields, options), metadata=metadata_of(prompt.fields, options))


# ---- what they return


def _one(returned: Any) -> Any:
    if isinstance(returned, list) and len(returned) == 1:
        returned = returned[0]
    if isinstance(returned, list):
        raise ValueError(f"it returned {len(returned)} samples: a trajectory is one sequence, so return one sample")
    if not all(hasattr(returned, name) for name in ("tokens", "response_length", "loss_mask", "status")):
        raise TypeError(f"it returned {extend.described(returned)}, not a Sample: return the one it was given")
    return returned


def _take(sample: Any, session: TokenSession) -> None:
    """Leaves out of the loss what the sample does, and takes its status. Raises `ValueError` where its tokens are others."""
    status = sample.status.value
    if status in ("aborted", "failed"):
        raise ValueError(f"it returned a sample of the status {status}")
    if getattr(sample, "remove_sample", False):
        raise ValueError("it returned a sample with remove_sample")
    known, tokens = session.tokens, [int(token) for token in sample.tokens]
    same = same_beginning(tokens, known)
    if same < len(known) and same < len(tokens):
        raise ValueError(f"sample.tokens differ at place {same} from the tokens that were posted and answered: keep those")
    first = len(tokens) - sample.response_length
    mask = sample.loss_mask
    if mask is not None and len(mask) != sample.response_length:
        raise ValueError(f"sample.loss_mask has {len(mask)} entries for a response_length of {sample.response_length}")
    sampled = {place for start, end in session.generated for place in range(start, end)}
    trained = sampled if mask is None else {first + place for place, trains in enumerate(mask) if trains}
    if strange := sorted(trained - sampled):
        raise ValueError(f"sample.loss_mask trains the token at place {strange[0]}, which no policy sampled: give 0 there")
    for place in sorted(sampled - {place for place in trained if first <= place < len(tokens)}):
        session.exclude(place, place + 1)
    session.truncated = {"truncated": True, "completed": False}.get(status)


def _left(sample: Any, known: set[str], metadata: str) -> dict[str, Any]:
    """What the function left in its sample for a reward: `reward`, changed metadata, and attributes of its own."""
    info: dict[str, Any] = {} if sample.reward is None else {"reward": sample.reward}
    left = {"attributes": {name: value for name, value in vars(sample).items() if name not in known and _is_json(value)}}
    if json.dumps(sample.metadata, default=repr) != metadata:
        left["metadata"] = {name: value for name, value in sample.metadata.items() if _is_json(value)}
    return info | {GENERATED: found} if (found := {name: value for name, value in left.items() if value}) else info


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
