"""OpenAI's chat completions for agents that know a base URL and a key: one server for each process that rolls.

The key names the session, so it is good for one trajectory. How tokens are sampled is the run's to say; parameters of a request that would
change it are not heeded, and a trajectory's `info` names them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from verst.errors import ExtensionError
from verst.rollout.chat_api import checked, chunks, whole
from verst.rollout.sessions import Session, SessionRefused

if TYPE_CHECKING:
    from aiohttp import web

MODEL = "policy"
LARGEST_REQUEST = 16 << 20
"""Bytes: more than a conversation of a million tokens has."""
_ENDED = 10_000
"""Keys of sessions that have ended, which are told so."""


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
        app = web.Application(client_max_size=LARGEST_REQUEST)
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
        if (request.content_length or 0) > LARGEST_REQUEST:
            return _error(413, "request_too_large", f"a request has at most {LARGEST_REQUEST} bytes: cut what tools have printed")
        try:
            body = json.loads((await request.read()).decode())
            asked = checked(body)
        except (ValueError, RecursionError) as error:
            return _error(400, "invalid_request", str(error))
        session.not_heeded |= asked.not_heeded
        again = request.headers.get("x-stainless-retry-count", "0") != "0"  # how OpenAI's clients mark what they send once more
        try:
            answers = await asyncio.gather(
                *(session.ask(asked.messages, tools=asked.tools, calls=asked.calls, again=again) for _ in range(asked.choices))
            )
        except SessionRefused as error:
            return _error(400, "session_refused", str(error))
        described = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time()), "model": body.get("model") or MODEL}
        if not body.get("stream"):
            return web.json_response(whole(answers, described))
        return await _streamed(request, chunks(answers, described, usage=asked.usage))


async def _streamed(request: web.Request, parts: Iterable[Mapping[str, Any]]) -> web.StreamResponse:
    from aiohttp import web

    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        await response.prepare(request)
        for chunk in parts:
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    except ConnectionError:
        pass  # the client has left: its agent's next call says what becomes of the trajectory
    return response


def _error(status: int, code: str, message: str) -> web.Response:
    from aiohttp import web

    return web.json_response({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}, status=status)
