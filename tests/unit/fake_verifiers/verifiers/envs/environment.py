"""Environments and rubrics, as far as Verst knows them."""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAIError


class Error(Exception): ...


class ModelError(Error): ...


class EmptyModelResponseError(ModelError): ...


class Rubric:
    def __init__(self, funcs: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None) -> None:
        self.funcs, self.weights = list(funcs), list(weights or [1.0] * len(funcs))

    def _get_group_reward_func_names(self) -> list[str]:
        return [function.__name__ for function in self.funcs if {"completions", "states"} & {*inspect.signature(function).parameters}]

    async def score_rollout(self, state: dict[str, Any]) -> None:
        metrics, known = {}, {**state["input"], "completion": state["completion"], "state": state}
        for function in self.funcs:
            parameters = inspect.signature(function).parameters
            any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            given = {name: value for name, value in known.items() if any_name or name in parameters}
            try:
                value = function(**given)
                metrics[function.__name__] = float(await value if inspect.isawaitable(value) else value)
            except Exception:  # noqa: BLE001 - as the library does
                metrics[function.__name__] = 0.0
        state["metrics"] = metrics
        state["reward"] = sum(weight * value for weight, value in zip(self.weights, metrics.values(), strict=True))


class RubricGroup:
    def __init__(self, rubrics: Sequence[Rubric]) -> None:
        self.rubrics = list(rubrics)

    async def score_rollout(self, state: dict[str, Any]) -> None:
        reward, metrics = 0.0, {}
        for rubric in self.rubrics:
            await rubric.score_rollout(state)
            reward, metrics = reward + state["reward"], {**metrics, **state["metrics"]}
        state["reward"], state["metrics"] = reward, metrics


def num_turns(state: Mapping[str, Any]) -> int:
    return len(state["trajectory"])


class Environment:
    """A loop of requests, with the tools that it is given."""

    def __init__(
        self, *, dataset: Any, rubric: Rubric, system_prompt: str | None = None, tools: Sequence[Any] = (), max_turns: int = 10
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the library does, wherever it is
        self.env_id, self.max_turns = "", max_turns
        self.rubric = RubricGroup([rubric, Rubric([num_turns], [0.0])])
        self._rows = [self._row(number, row, system_prompt) for number, row in enumerate(dataset)]
        self._tools = {tool.__name__: tool for tool in tools}

    def _row(self, number: int, row: Mapping[str, Any], system: str | None) -> dict[str, Any]:
        before = [{"role": "system", "content": system}] if system else []
        prompt = [*before, {"role": "user", "content": row["question"]}]
        return {"prompt": prompt, "example_id": number, "task": "default", **row}

    def get_dataset(self) -> list[dict[str, Any]]:
        return self._rows

    async def rollout(self, input: Mapping[str, Any], client: AsyncOpenAI, model: str) -> dict[str, Any]:
        state: dict[str, Any] = {"input": input, "trajectory": [], "error": None, "metrics": None, "reward": None}
        messages: list[Any] = list(input["prompt"])
        try:
            while "stop_condition" not in state:
                await self._turn(state, messages, client, model)
        except Error as error:
            state |= {"error": error, "stop_condition": "has_error"}
        state["completion"] = messages[len(input["prompt"]) :]
        return state

    async def _turn(self, state: dict[str, Any], messages: list[Any], client: AsyncOpenAI, model: str) -> None:
        tools: Any = {"tools": [_described(tool) for tool in self._tools.values()]} if self._tools else {}
        try:
            choice = (await client.chat.completions.create(model=model, messages=messages, **tools)).choices[0]
        except BadRequestError as error:
            if "this model's maximum context length is" not in str(error):
                raise ModelError from error
            state["stop_condition"] = "prompt_too_long"
            return
        except OpenAIError as error:
            raise ModelError from error
        if not choice.message.content and not choice.message.tool_calls:
            raise EmptyModelResponseError("Model returned no content and did not call any tools")
        messages.append(choice.message.model_dump(exclude_none=True))
        state["trajectory"].append(choice)
        for call in choice.message.tool_calls or ():
            try:
                result = self._tools[call.function.name](**json.loads(call.function.arguments))
            except Exception as error:  # noqa: BLE001 - as the library does
                result = error
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        if not choice.message.tool_calls:
            state["stop_condition"] = "no_tools_called" if self._tools else "max_turns_reached"
        elif len(state["trajectory"]) == self.max_turns:
            state["stop_condition"] = "max_turns_reached"


class SingleTurnEnv(Environment):
    def __init__(self, **options: Any) -> None:
        super().__init__(max_turns=1, **options)


ToolEnv = Environment


def _described(tool: Callable[..., Any]) -> dict[str, Any]:
    properties = {name: {"type": "integer"} for name in inspect.signature(tool).parameters}
    function = {"name": tool.__name__, "description": tool.__doc__, "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function}
