"""A trajectory's messages as rewards of other makers and models want them."""

from __future__ import annotations

from collections.abc import Sequence

from verst.types import Message, Trajectory


def split(trajectory: Trajectory) -> tuple[Sequence[Message], Sequence[Message]]:
    """The messages of the prompt, and those from the first generated one on; either may hold answers that nobody sampled."""
    messages, first = trajectory.messages, len(trajectory.messages)
    for turn in reversed(trajectory.turns):
        answers = [place for place in range(first) if messages[place].role == "assistant"]
        if not answers:
            break
        # By its text; a demonstration's turn has what the template puts around it too, and is then the last one left.
        first = next((place for place in reversed(answers) if messages[place].content == turn.text), answers[-1])
    return messages[:first], messages[first:]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates and most libraries have them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def as_text(messages: Sequence[Message]) -> str:
    """Contents, joined with nothing between."""
    return "".join(m.content for m in messages)
