"""Which slots still hold the keys and values of which prompt, so that the members of a group prefill it once."""

from __future__ import annotations

from verst.rollout.hf.model import Passed


class HeldPrompts:
    """A slot holds its prompt from admission until another prompt takes the slot, also while free. Emptied when weights change."""

    def __init__(self, slots: int) -> None:
        self._prompt_of: list[bytes | None] = [None] * slots
        self._passed: dict[bytes, Passed] = {}  # the prompt's pass

    def find(self, prompt: bytes) -> tuple[int, Passed] | None:
        """A slot that holds the prompt, and what its pass gave: the logits that follow it and the routes of its tokens."""
        passed = self._passed.get(prompt)
        return None if passed is None else (self._prompt_of.index(prompt), passed)

    def holds(self, slot: int, prompt: bytes) -> bool:
        return self._prompt_of[slot] == prompt

    def put(self, slot: int, prompt: bytes, passed: Passed) -> None:
        """From now on the slot holds this prompt and no other."""
        self._release(slot)
        self._prompt_of[slot] = prompt
        self._passed[prompt] = passed

    def move(self, source: int, target: int) -> None:
        """The content of `source` now lies in `target`."""
        prompt = self._prompt_of[source]
        self._prompt_of[source] = None
        self._release(target)
        self._prompt_of[target] = prompt

    def clear(self) -> None:
        """Forgets everything: what the slots hold comes from weights that are gone."""
        self._prompt_of = [None] * len(self._prompt_of)
        self._passed.clear()

    def _release(self, slot: int) -> None:
        prompt, self._prompt_of[slot] = self._prompt_of[slot], None
        if prompt is not None and prompt not in self._prompt_of:
            self._passed.pop(prompt, None)
