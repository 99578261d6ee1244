"""Environments of the library verifiers (Prime Intellect), as agents: `rollout.environment: verifiers:NAME` or `verifiers:module:loader`.

Such an environment asks an OpenAI client for completions, and a session is one. Its rubric scores the rollout where it ends, and what it
says is the trajectory's `info`, of which the reward `from_info` makes the reward. Its tools and reward functions may be plain ones that
compute or wait: like all code of users, they hold up no engine (`verst.rollout.user_loop`).

The library changes its protocol between versions; what is used here is that of `VERSION`: `load_environment`, `Environment.rollout(input,
client, model)`, `rubric.score_rollout(state)`, and the state's `reward`, `metrics`, `error` and `stop_condition`.
https://github.com/PrimeIntellect-ai/verifiers
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

from verst import extend
from verst.errors import EnvironmentFailure, ExtensionError
from verst.rewards.metrics import PREFIX
from verst.rollout.sessions import Session
from verst.types import Prompt

VERSION = "0.1.10"
_INPUT = ("answer", "task", "info", "example_id")
_raised: ContextVar[list[str]] = ContextVar("_raised")
"""What reward functions of the rollout that is being scored have raised."""


class Verifiers:
    """An agent that gives its conversation to an environment of verifiers.

    Args:
        reference: a name that `verifiers.load_environment` knows, or `module:loader`.
        options: of the loader.

    Raises `ExtensionError` if verifiers is not installed here in the version that this was written for.
    """

    def __init__(self, reference: str, options: Mapping[str, Any]) -> None:
        _require_version()
        self._reference, self._options = reference, dict(options)
        self._environment: Any = None

    def check_machine(self) -> None:
        """Loads the environment, with its data. Raises `ExtensionError` if that fails, or if its rubric cannot score one rollout alone."""
        self._environment = load(self._reference, self._options)
        for rubric in _rubrics(self._environment.rubric):
            group = rubric._get_group_reward_func_names()
            if group:
                raise ExtensionError(
                    f"environment verifiers:{self._reference}: {', '.join(group)} scores the rollouts of a group together, and each is "
                    "scored where it ends: make it a function of one rollout"
                )
            rubric.funcs = [_remembered(function) for function in rubric.funcs]

    async def __call__(self, session: Session, prompt: Prompt) -> dict[str, Any]:
        assert self._environment is not None, "check_machine() comes first"
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        environment = self._environment
        asked = {name: prompt.fields[name] for name in _INPUT if prompt.fields.get(name) is not None}
        asked = {"example_id": 0, "task": environment.env_id or "default", **asked}
        asked["prompt"] = [{"role": message.role, "content": message.content} for message in prompt.messages]
        raised: list[str] = []
        _raised.set(raised)
        direct = DefaultAsyncHttpxClient(trust_env=False, timeout=None)  # a proxy of the environment is not for this machine
        async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, timeout=None, http_client=direct) as client:
            state = await environment.rollout(asked, client, "policy")
        if state["error"] is not None:
            raise EnvironmentFailure(f"environment verifiers:{self._reference}: {_chain(state['error'])}")
        raised.clear()
        await environment.rubric.score_rollout(state)
        if raised:  # the library makes a silent 0 of it
            raise EnvironmentFailure(f"environment verifiers:{self._reference}: {raised[0]}")
        return _reported(state)


def load(reference: str, options: Mapping[str, Any]) -> Any:
    """The environment. Raises `ExtensionError` if it cannot be loaded."""
    library: Any = importlib.import_module("verifiers")
    module: Any = importlib.import_module("verifiers.envs.environment")
    what = f"environment verifiers:{reference}"
    if ":" in reference:
        loader = extend.load(reference, shipped={}, kind="environment")
        extend.check_callable(loader, "environment", (), options)
    else:
        loader = partial(library.load_environment, reference)
    signals, module.signal = module.signal, _no_signals(module.signal)
    try:
        made = extend.guarded(lambda: loader(**options), what, ExtensionError)
    finally:
        module.signal = signals
    if not isinstance(made, module.Environment):
        raise ExtensionError(f"{what} is {extend.described(made)}: the loader must return a verifiers.Environment")
    return made


def rows(reference: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The prompts of an environment's data set, as rows for `data.path` or `verst.train(prompts=…)`, with what its rubric needs of each."""
    for row in load(reference, options).get_dataset():
        yield {name: row[name] for name in ("prompt", *_INPUT) if row.get(name) is not None}


def _require_version() -> None:
    install = f"pip install verifiers=={VERSION}"
    if importlib.util.find_spec("verifiers") is None:
        raise ExtensionError(f"environments of verifiers need that library, which is not installed: {install}")
    found = importlib.metadata.version("verifiers")
    if found != VERSION:
        raise ExtensionError(
            f"environments of verifiers are used by the protocol of its version {VERSION}, and {found} is installed: {install}"
        )


def _no_signals(signals: Any) -> Any:
    """For the making of an environment, which takes signals of its process for itself: they are the run's, and threads may not."""
    return SimpleNamespace(**{**vars(signals), "signal": lambda *_: None})


def _rubrics(rubric: Any) -> Iterator[Any]:
    """Those that have functions: a group of rubrics has others."""
    for inner in getattr(rubric, "rubrics", ()):
        yield from _rubrics(inner)
    if not hasattr(rubric, "rubrics"):
        yield rubric


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same reward function; what it raises is noted, since the library takes it for a 0."""

    @wraps(function)
    async def noting(*args: Any, **keywords: Any) -> float:
        try:
            found = function(*args, **keywords)
            value = float(await found if inspect.isawaitable(found) else found)
        except Exception as error:
            _raised.get().append(f"reward function {function.__name__} raised {extend.origin(error)}")
            raise
        if not math.isfinite(value):
            _raised.get().append(f"reward function {function.__name__} returned {value}, not a finite number")
        return value

    return noting


def _reported(state: Mapping[str, Any]) -> dict[str, Any]:
    """The reward, each of the rubric's functions as a metric, and why the rollout ended."""
    metrics = {f"{PREFIX}{name}": float(value) for name, value in (state["metrics"] or {}).items()}
    return {**metrics, "reward": float(state["reward"]), "stop": state.get("stop_condition") or "none"}


def _chain(error: BaseException | None) -> str:
    """An error of the library and its causes, which say more."""
    words: list[str] = []
    while error is not None and len(words) < 4:
        words.append(f"{type(error).__name__}: {error}".strip(": "))
        error = error.__cause__
    return " <- ".join(words)
