"""An environment of one's own: `rollout.environment: own:RunningTotal`, started in this directory; rows have {"numbers": [3, 4, 5]}."""

import re

from verst.types import Completion, Message, Prompt, Reply


class RunningTotal:
    """Says one number after the other; the model has to keep the total. A wrong total ends the trajectory."""

    async def start(self, prompt: Prompt) -> list[Message]:
        self._numbers = list(prompt.fields["numbers"])
        self._total = self._right = 0
        return [*prompt.messages, Message("user", self._next())]

    async def reply(self, completion: Completion) -> Reply:
        said = re.findall(r"-?\d+", completion.text)
        right = bool(said) and said[-1] == str(self._total)
        self._right += right
        info = {"right": self._right, "solved": right and not self._numbers}
        if not right or not self._numbers:
            return Reply(info=info)
        return Reply((Message("user", self._next()),), done=False, info=info)

    def _next(self) -> str:
        number = self._numbers.pop(0)
        self._total += number
        return f"Add {number}. What is the total?"
