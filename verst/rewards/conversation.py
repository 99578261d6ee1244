"""A trajectory's messages as rewards of other makers and models want them."""

from __future__ import annotations

from collections.abc import Sequence

from verst.types import Message, Trajectory


def split(trajectory: Trajectory) -> tuple[Sequence[Message], Sequence[Message]]:
    """The messages of the prompt, and those from the first generated one on; either may hold answers that nobody sampled.

    Which were is told by the texts of turns: of two answers with the same text the later one counts as the sampled one.
    """
    messages, first = trajectory.messages, len(trajectory.messages)
    for turn in reversed(trajectory.turns):
        last = None
        for place in range(first - 1, -1, -1):
            if messages[place].role != "assistant":
                continue
            last = place if last is None else last  # a demonstration's turn has what the template puts around its text too
            if messages[place].content == turn.text:
                last = place
                break
        if last is None:
            break
        first = last
    return messages[:first], messages[first:]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates and most libraries have them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def as_text(messages: Sequence[Message]) -> str:
    """Contents, joined with nothing between."""
    return "".join(m.content for m in messages)
