"""Which reward scores a run, in a form that travels to worker processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from verst.errors import ExtensionError
from verst.extend import load, made
from verst.rewards import adapters
from verst.rewards.table import SHIPPED

if TYPE_CHECKING:
    from verst.config.schema import RewardConfig  # pydantic would slow the start of every worker


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """A reward by reference (a shipped name, `module:name`, or that with an adapter's prefix), or pickled by value in `function`.

    `options` are its keyword arguments. `model`: the policy's directory, if it is known; slime's functions see its chat template.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    function: bytes | None = None
    model: str | None = None

    @classmethod
    def of(cls, config: RewardConfig, function: Callable[..., Any] | None = None, model: str | None = None) -> RewardSpec:
        """What the run file names, or `function` given from Python. Raises `ExtensionError` if `function` cannot be pickled."""
        if function is None:
            return cls(config.function, config.options, model=model)
        import cloudpickle

        name = getattr(function, "__qualname__", type(function).__qualname__)
        try:
            return cls(name, config.options, cloudpickle.dumps(function))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ExtensionError(
                f"reward {name} cannot be sent to its worker process: {error}. Open connections, locks and files inside the function, "
                "or write it in a module and give `module:function`"
            ) from error

    def build(self) -> Callable[..., Any]:
        """The reward, ready to call with trajectory and fields. A class is made once, with the options; a function gets them in each call.

        Runs the user's module: raises `ExtensionError` if it cannot be imported or its signature does not fit.
        """
        adapted = adapters.parts(self.name) if self.function is None else None
        if adapted is not None:
            return adapters.build(*adapted, self.options, self.model)
        found = load(self.name, shipped=SHIPPED, kind="reward") if self.function is None else pickle.loads(self.function)
        if not callable(found):
            raise ExtensionError(f"reward {self.name!r} is {found!r} of type {type(found).__name__}: give a function or a class")
        return made(found, "reward", ("trajectory", "fields"), self.options)

    def open(self) -> Callable[..., Any]:
        """As `build`, in the process that will score: a shipped reward also loads its model or opens its connections."""
        reward = self.build()
        if self._shipped is not None and hasattr(self._shipped, "open"):
            cast(Any, reward).open()
        return reward

    @property
    def secrets(self) -> tuple[str, ...]:
        """Environment variables that a shipped reward needs though their names speak of secrets: those that its options name."""
        named = [self.options.get(option) for option in getattr(self._shipped, "SECRETS", ())]
        return tuple(name for name in named if isinstance(name, str))

    @property
    def _shipped(self) -> type | None:
        return SHIPPED.get(self.name) if self.function is None else None
