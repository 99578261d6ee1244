"""Python objects given to `verst.train` in place of names in the run file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from verst.errors import ExtensionError

_UNPICKLABLE = (TypeError, AttributeError, ValueError, RecursionError, pickle.PicklingError)


@dataclass(frozen=True, slots=True)
class MadeAnew:
    """Rows from a function that returns a fresh iterator each time, so that every epoch and every resumed run can read them."""

    make: Callable[..., Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())


@dataclass(frozen=True, slots=True)
class Extensions:
    """A reward function, an environment class, prompt rows. None: as the run file says."""

    reward: Any = None
    environment: Any = None
    prompts: Any = None

    def pack(self) -> bytes | None:
        """Bytes that other processes, and a resumed run, can load; None if nothing was given.

        Functions and classes are taken by value (cloudpickle), so that ones written in a notebook or script work.

        Raises:
            ExtensionError: something cannot be pickled, such as a generator that is already running.
        """
        if self.reward is None and self.environment is None and self.prompts is None:
            return None
        if isinstance(self.prompts, Iterator):
            raise ExtensionError(
                "prompts: an iterator can be read only once, so a resumed run could not continue it; "
                "give a list, or the function that makes the iterator"
            )
        import cloudpickle

        try:
            return cloudpickle.dumps((self.reward, self.environment, self.prompts))
        except _UNPICKLABLE as error:
            raise ExtensionError(
                f"{self._unpicklable()}, given to verst.train, cannot be sent to other processes: {error}. Open connections, locks and "
                "files inside it, or write it in a module and name it in the run file"
            ) from error

    def of_replicas(self) -> bytes | None:
        """Packed, what replicas need: without the prompts, which may be many."""
        return Extensions(self.reward, self.environment).pack()

    def _unpicklable(self) -> str:
        import cloudpickle

        for name in ("reward", "environment", "prompts"):
            given = getattr(self, name)
            try:
                cloudpickle.dumps(given)
            except _UNPICKLABLE:
                return f"{name} {getattr(given, '__qualname__', type(given).__name__)}"
        return "an object"

    @property
    def rows(self) -> Any:
        """The prompts as something that can be iterated over."""
        return MadeAnew(self.prompts) if callable(self.prompts) else self.prompts

    @classmethod
    def unpack(cls, packed: bytes | None) -> Extensions:
        """What `pack` made. Raises `ExtensionError` if a module that it refers to is not there (any more)."""
        if packed is None:
            return cls()
        import cloudpickle

        try:
            return cls(*cloudpickle.loads(packed))
        except (pickle.UnpicklingError, EOFError) as error:
            raise ExtensionError(f"the run's extensions.pkl is damaged ({error}): put it back from a copy") from error
        except (ImportError, AttributeError) as error:
            raise ExtensionError(
                f"a function or object given to verst.train cannot be loaded: {error}. What a script defines travels with the run; "
                "a module is looked for in the directory where the run began and on PYTHONPATH: put it back there"
            ) from error
