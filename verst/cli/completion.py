from typing import Any


def add(commands: Any, build: Any) -> None: ...
