"""Types of the run file's values, and the section that holds them. Nothing is imported but pydantic."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema


def _not_a_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # YAML's yes and on; Python would take them for 1
        raise ValueError("expected a number, not true or false")
    return value


def _greedy_or_warm(temperature: float) -> float:
    if 0 < temperature < _COLDEST:
        raise ValueError(f"a temperature between 0 and {_COLDEST} is greedy in all but name: use 0, or {_COLDEST} or more")
    return temperature


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected text without the character NUL")
    return text


_COLDEST = 0.01

Whole = Annotated[int, BeforeValidator(_not_a_truth_value), Field(ge=0, le=2**31 - 1)]
"""A whole number, 0 included."""
Count = Annotated[int, BeforeValidator(_not_a_truth_value), Field(gt=0, le=2**31 - 1)]
Real = Annotated[float, BeforeValidator(_not_a_truth_value), Field(ge=0, allow_inf_nan=False)]
"""A finite number, not below 0: what almost every float of the run file is."""
Number = Annotated[float, BeforeValidator(_not_a_truth_value), Field(allow_inf_nan=False)]
"""A finite number, also below 0."""
Positive = Annotated[float, BeforeValidator(_not_a_truth_value), Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[Positive, Field(le=30 * 86400)]
Temperature = Annotated[
    Real,
    Field(le=100),
    AfterValidator(_greedy_or_warm),
    WithJsonSchema({"anyOf": [{"const": 0}, {"type": "number", "minimum": _COLDEST, "maximum": 100}]}),
]
Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Options = dict[str, JsonValue]
"""Keyword arguments for code that is not the core's: what a run file can hold, and a resumed run reads back unchanged."""


class Section(BaseModel):
    """A part of the run file: unknown keys are errors, values are never changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
