"""A trajectory's messages as rewards of other makers and models want them."""

from __future__ import annotations

from collections.abc import Sequence

from verst.types import Message, Trajectory


def split(trajectory: Trajectory) -> tuple[Sequence[Message], Sequence[Message]]:
    """The messages of the prompt, and those from the first generated one on; a prompt may hold answers too, as examples."""
    left = len(trajectory.turns)
    for place in range(len(trajectory.messages) - 1, -1, -1):
        left -= trajectory.messages[place].role == "assistant"
        if left <= 0:
            return trajectory.messages[:place], trajectory.messages[place:]
    return trajectory.messages, ()


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates and most libraries have them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def as_text(messages: Sequence[Message]) -> str:
    """Contents, joined with nothing between."""
    return "".join(m.content for m in messages)
