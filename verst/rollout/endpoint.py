"""OpenAI's chat completions for agents that know a base URL and a key: one server for each process that rolls.

The key names the session, so it is good for one trajectory. What a session cannot do is refused with the reason and never guessed: several
choices, tools in the request (a template renders them elsewhere), log-probabilities. How tokens are sampled is the run's to say; parameters
of a request that would change it are not heeded, and a trajectory's `info` names them.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from verst.errors import ExtensionError
from verst.rollout.sessions import Session, SessionRefused
from verst.types import Completion, FinishReason, Message

if TYPE_CHECKING:
    from aiohttp import web

MODEL = "policy"
_LARGEST_REQUEST = 16 << 20
_ENDED = 10_000
"""Keys of sessions that have ended, which are told so."""

_REFUSED = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "audio", "prediction")
_NOT_HEEDED = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "reasoning_effort",
)
_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Endpoint:
    """Serves the sessions that were added. On the loopback interface, at a port that the system chooses."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._ended: deque[str] = deque(maxlen=_ENDED)
        self._runner: web.AppRunner
        self.url = ""

    @classmethod
    async def start(cls) -> Endpoint:
        """Raises `ExtensionError` without aiohttp."""
        try:
            from aiohttp import web
        except ImportError as error:
            raise ExtensionError("agents are served by aiohttp, which is not installed: pip install 'verst[agents]'") from error
        endpoint = cls()
        app = web.Application(client_max_size=_LARGEST_REQUEST)
        app.router.add_post("/v1/chat/completions", endpoint._complete)
        app.router.add_get("/v1/models", endpoint._models)
        endpoint._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await endpoint._runner.setup()
        await web.TCPSite(endpoint._runner, "127.0.0.1", 0).start()
        endpoint.url = f"http://127.0.0.1:{endpoint._runner.addresses[0][1]}/v1"
        return endpoint

    async def close(self) -> None:
        """Sessions that are open have ended."""
        for session in tuple(self._sessions.values()):
            session.end()
        await self._runner.cleanup()

    def add(self, session: Session) -> None:
        self._sessions[session.api_key] = session

    def remove(self, session: Session) -> None:
        if self._sessions.pop(session.api_key, None) is not None:
            self._ended.append(session.api_key)

    # ---- requests

    def _session(self, request: web.Request) -> Session | web.Response:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        found = self._sessions.get(key)
        if scheme == "Bearer" and found is not None:
            return found
        if key in self._ended:
            return _error(410, "session_ended", "this trajectory has ended: a session is good for one")
        return _error(401, "invalid_api_key", "no session has this key: use the api_key and the base_url of the session")

    async def _models(self, request: web.Request) -> web.Response:
        from aiohttp import web

        found = self._session(request)
        if isinstance(found, Session):
            return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "verst"}]})
        return found

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        session = self._session(request)
        if not isinstance(session, Session):
            return session
        try:
            body = json.loads((await request.read()).decode())
            messages = checked(body)
        except ValueError as error:
            return _error(400, "invalid_request", str(error))
        session.not_heeded |= {name for name in _NOT_HEEDED if body.get(name) is not None}
        again = request.headers.get("x-stainless-retry-count", "0") != "0"  # how OpenAI's clients mark what they send once more
        try:
            completion = await session.complete(messages, again=again)
        except SessionRefused as error:
            return _error(400, "session_refused", str(error))
        described = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time()), "model": body.get("model") or MODEL}
        if not body.get("stream"):
            return web.json_response(whole(completion, described))
        return await _streamed(request, completion, described)


def checked(body: Any) -> list[Message]:
    """The conversation of a request. Raises `ValueError` with the reason where it cannot be answered."""
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ValueError("the body must be a JSON object with a list of messages")
    if body.get("n") not in (None, 1):
        raise ValueError("n must be 1: a session is one conversation")
    refused = [name for name in _REFUSED if body.get(name)]
    if refused:
        raise ValueError(f"{', '.join(refused)}: not supported by a session; describe tools in a message, and parse the answer")
    if (body.get("response_format") or {}).get("type", "text") != "text":
        raise ValueError("response_format: a session answers with text only")
    return [_message(number, message) for number, message in enumerate(body["messages"])]


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} must be an object with a role")
    if message.get("tool_calls"):
        raise ValueError(f"message {number} has tool_calls: a session's assistant answers with text only")
    content = message.get("content")
    if isinstance(content, list):
        content = _text(number, content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text: content must be a string, or parts of the type text")
    return Message(message["role"], content)


def _text(number: int, parts: Sequence[Any]) -> str:
    if not all(isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise ValueError(f"message {number} has parts that are no text: the policy reads text only")
    return "".join(part["text"] for part in parts)


def whole(completion: Completion, described: Mapping[str, Any]) -> dict[str, Any]:
    """A `chat.completion` object. It has no `usage`: the tokens of the prompt are counted later."""
    message = {"role": "assistant", "content": completion.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _FINISH.get(completion.finish, "stop")}
    return {**described, "object": "chat.completion", "choices": [choice]}


async def _streamed(request: web.Request, completion: Completion, described: Mapping[str, Any]) -> web.StreamResponse:
    """The completion in two chunks: all of its text, and its end. It was whole before the first could be sent."""
    from aiohttp import web

    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    deltas = [({"role": "assistant", "content": completion.text}, None), ({}, _FINISH.get(completion.finish, "stop"))]
    try:
        await response.prepare(request)
        for delta, finish in deltas:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            chunk = {**described, "object": "chat.completion.chunk", "choices": [choice]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    except ConnectionError:
        pass  # the client has left: its agent's next call says what becomes of the trajectory
    return response


def _error(status: int, code: str, message: str) -> web.Response:
    from aiohttp import web

    return web.json_response({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}, status=status)
