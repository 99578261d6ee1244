"""SGLang's `/generate` for one trajectory, for functions that post to a server's address: token ids in, token ids out.

Each trajectory has a port of its own on the loopback interface, while it lasts: such functions know an address and no key, so the port says
whose a request is. What would train on other tokens than were sampled is refused with the reason.

https://docs.sglang.io/basic_usage/native_api.html, https://docs.sglang.io/basic_usage/sampling_params.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from verst.config.text import is_unicode
from verst.errors import ExtensionError
from verst.rollout.sessions import SessionRefused
from verst.rollout.tokens import TokenSession
from verst.types import Completion, FinishReason

if TYPE_CHECKING:
    from aiohttp import web

HOST = "127.0.0.1"
_LARGEST_REQUEST = 64 << 20
_REFUSED = ("stream", "image_data", "video_data", "audio_data", "input_embeds", "lora_path", "session_params")
_REFUSED_SAMPLING = ("json_schema", "regex", "ebnf", "structural_tag", "logit_bias", "custom_params")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_NEUTRAL: Mapping[str, Any] = {
    **{"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_new_tokens": 0, "ignore_eos": False},
    **{"seed": None, "sampling_seed": None, "stop_token_ids": None},
}


class GenerateEndpoint:
    """Serves one session. `not_heeded`: parameters of its requests that would have changed how tokens are sampled."""

    def __init__(self, session: TokenSession) -> None:
        self._session = session
        self._runner: web.AppRunner
        self.port = 0
        self.not_heeded: set[str] = set()

    @classmethod
    async def start(cls, session: TokenSession) -> GenerateEndpoint:
        """It is closed with its session. Raises `ExtensionError` without aiohttp."""
        try:
            from aiohttp import web
        except ImportError as error:
            raise ExtensionError("generate functions are served by aiohttp, which is missing: pip install 'verst[agents]'") from error
        endpoint = cls(session)
        app = web.Application(client_max_size=_LARGEST_REQUEST)
        app.router.add_post("/generate", endpoint._generate)
        app.router.add_route("*", "/{other:.*}", endpoint._other)
        endpoint._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        session.at_end.append(endpoint._runner.cleanup)
        await endpoint._runner.setup()
        await web.TCPSite(endpoint._runner, HOST, 0).start()
        endpoint.port = endpoint._runner.addresses[0][1]
        return endpoint

    async def _generate(self, request: web.Request) -> web.Response:
        from aiohttp import web

        try:
            body = json.loads((await request.read()).decode())
            sampling = _checked(body)
            tokens = self._tokens(body)
            self._note(sampling)
            completion = await self._session.generate(tokens, max_new_tokens=sampling.get("max_new_tokens"), stop=_stops(sampling))
        except (ValueError, SessionRefused) as error:
            return _refused(400, str(error))
        skips = sampling.get("skip_special_tokens", True)
        text = self._session.rolling.renderer.tokenizer.decode(list(completion.tokens), skip_special_tokens=skips)
        return web.json_response(answer(completion, str(text), len(tokens)))

    async def _other(self, request: web.Request) -> web.Response:
        return _refused(
            404, f"{request.method} {request.path} is not answered: a generate function may post to /generate, and to nothing else"
        )

    def _tokens(self, body: Mapping[str, Any]) -> list[int]:
        """Token ids of a request. Text is tokenised where it is new only."""
        ids, text = body.get("input_ids"), body.get("text")
        if isinstance(ids, list) and text is None:
            return ids
        if ids is not None or not isinstance(text, str):
            raise ValueError("give input_ids, a list of whole numbers, or text, of one sequence")
        if not is_unicode(text):  # JSON has halves as escapes
            raise ValueError("text has half of a surrogate pair, which no tokenizer takes")
        session = self._session
        known = session.tokens
        before = session.decode(known) if known else ""
        if not text.startswith(before):
            raise ValueError(
                "text does not begin with that of the tokens so far, so it would be tokenised anew, and what is trained would be no tokens "
                "that were sampled: post input_ids, made of meta_info.output_token_logprobs"
            )
        return [*known, *session.encode(text[len(before) :])]

    def _note(self, sampling: Mapping[str, Any]) -> None:
        own = {name: getattr(self._session.sampling, name) for name in _SAMPLING}
        given = {**sampling, "top_k": max(sampling.get("top_k") or 0, 0)}
        expected = own | dict(_NEUTRAL)
        self.not_heeded |= {name for name, value in expected.items() if given.get(name) not in (None, value)}


def answer(completion: Completion, text: str, prompt_tokens: int) -> dict[str, Any]:
    """As SGLang answers a request with `return_logprob`."""
    kind = "length" if completion.finish is FinishReason.LENGTH else "stop"
    pairs = zip(completion.logprobs, completion.tokens, strict=True)
    about = {
        "finish_reason": {"type": kind},
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(completion.tokens),
        "cached_tokens": 0,
        "output_token_logprobs": [[logprob, token, None] for logprob, token in pairs],
    }
    return {"text": text, "output_ids": list(completion.tokens), "meta_info": about}


def _checked(body: Any) -> Mapping[str, Any]:
    """The sampling parameters of a request. Raises `ValueError` with the reason where it cannot be answered."""
    if not isinstance(body, Mapping):
        raise ValueError("the body must be a JSON object")
    sampling = body.get("sampling_params") or {}
    if not isinstance(sampling, Mapping):
        raise ValueError("sampling_params must be one object")
    refused = [name for name in _REFUSED if body.get(name)] + [name for name in _REFUSED_SAMPLING if sampling.get(name)]
    if refused:
        raise ValueError(f"{', '.join(refused)}: not supported, since tokens are sampled as the run says and one sequence at a time")
    if sampling.get("n") not in (None, 1):
        raise ValueError("n must be 1: a trajectory is one sequence")
    limit = sampling.get("max_new_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise ValueError(f"max_new_tokens is {limit!r}: give a whole number")
    return sampling


def _stops(sampling: Mapping[str, Any]) -> list[str] | None:
    stop = sampling.get("stop")
    return [stop] if isinstance(stop, str) else stop


def _refused(status: int, message: str) -> web.Response:
    from aiohttp import web

    return web.json_response({"error": {"message": message}}, status=status)
