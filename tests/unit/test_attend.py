"""Watching over a loop whose process dies again and again."""

from __future__ import annotations

import pytest

from verst.runtime import attend
from verst.runtime.actors import WorkerDied


class Dying:
    """Stands for the watch over one life of the loop's process, which ends at once."""

    lives = 0
    last = 1_000_000

    def __init__(self, *_: object) -> None:
        Dying.lives += 1

    def until_it_ends(self) -> None:
        if Dying.lives < Dying.last:
            raise WorkerDied("loop died (watching): out of memory")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(attend, "_Watch", Dying)
    monkeypatch.setattr(attend, "_until_it_answers", lambda handle, death: None)
    monkeypatch.setattr(Dying, "lives", 0)
    return []


def test_a_loop_that_dies_now_and_then_is_watched_on(told: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Dying, "last", 4)
    attend.watch_over(None, attend.Asked(), told.append)
    assert told == ["the loop's process died: it starts again and goes on from its journal"] * 3


def test_a_loop_that_dies_again_and_again_ends_the_run_and_says_what_may_kill_it(told: list[str]):
    with pytest.raises(WorkerDied, match=r"died 4 times in 0 s.*verst resume.*memory of a machine is full.*The last death: loop died"):
        attend.watch_over(None, attend.Asked(), told.append)
    assert len(told) == 3
