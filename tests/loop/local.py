"""A whole run in this process: the real loop, engine, backend, scorer and journal, without Ray."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from tests.reference import DOCUMENT, undocumented
from verst.config.load import load_config
from verst.errors import VerstError
from verst.journal.audit import audit
from verst.observe.sinks import read_rows
from verst.rewards.scorer import Scorer
from verst.runtime.actors import LocalWorker
from verst.runtime.branch import create_run, open_branch
from verst.runtime.changes import reordered_since
from verst.runtime.extensions import Extensions
from verst.runtime.loop import Loop
from verst.runtime.placement import Placement
from verst.runtime.preflight import preflight
from verst.runtime.rundir import RunDirectory
from verst.runtime.service import RunService
from verst.runtime.stored import checkpoint_steps


def prompts_file(directory: Path) -> str:
    """64 prompts, for runs whose tasks do not matter: for those of reasoning-gym, command and loop import it, which takes 2 s each."""
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"count {i}", "answer": str(i % 5)}) + "\n" for i in range(64)))
    return str(path)


class InProcess(LocalWorker):
    """Whose end takes with it what a process would: the reward processes of a replica that was lost. At once: no event loop may follow."""

    def kill(self) -> None:
        end_rewards(self._object)


def end_rewards(replica: Any) -> None:
    """Ends the reward processes of a replica, as the end of its process would."""
    scorer: Scorer | None = getattr(replica, "_scorer", None)
    if scorer is not None:
        scorer.close()


def local_spawn(name: str, factory: Any, *args: Any, gpus: float = 0, env: Any = None) -> LocalWorker:
    return InProcess(name, factory(*args))


@dataclass
class LocalRun:
    run: RunDirectory
    lines: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.run.metrics)

    def metric(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if row.get(name) is not None]

    async def go(self, placement: Placement | None = None) -> LocalRun:
        """Runs, or continues, to the end; `lines` has what was told, also after an error."""
        service = RunService(str(self.run.root), local_spawn, placement)
        try:
            await service.run()
        finally:
            _, self.lines = await service.lines(0, 0)
        assert undocumented(self.rows) == set(), f"metrics that {DOCUMENT} does not explain"
        self.require_exactly_once()
        return self

    def require_exactly_once(self) -> None:
        _, config = RunDirectory.open(self.run.root)
        exact = config.run.deterministic and not reordered_since(self.run, 0)
        steps = checkpoint_steps(self.run)
        found = audit(self.run.journal, self.run.run_id, checkpoints=steps, worst_staleness=config.worst_staleness, exact=exact)
        assert found.violations == []


def local_run(directory: Path, model: Path, values: dict[str, Any], begin_from: str | None = None, **extensions: Any) -> LocalRun:
    """Makes a run of a small configuration; `values` are merged over it section by section.

    A test's own functions travel by value, as those of a user's script do: else each reward process would import the test, and PyTorch
    with it.
    """
    for extension in extensions.values():
        if getattr(extension, "__module__", "").startswith("tests."):
            cloudpickle.register_pickle_by_value(sys.modules[extension.__module__])
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(directory), "steps": 3, "seed": 1},
        "model": {"path": str(model)},
        "data": {"max_prompt_tokens": 64},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3},
    }
    if values.get("algorithm", {}).get("name") in ("sft", "dpo"):
        del base["rollout"]["group_size"]  # which does not apply
    given = Extensions(**extensions)
    config = load_config({k: base.get(k, {}) | values.get(k, {}) for k in base | values})
    branch = None if begin_from is None else open_branch(begin_from, config)
    return LocalRun(create_run(config, given.pack(), preflight(config, given).stream, branch))


async def stopped_after(run: LocalRun, step: int, placement: Placement | None = None) -> None:
    """Runs until so many steps are committed, then ends as a crash would: no checkpoint, no goodbye."""

    async def crash(self: Loop, *args: Any) -> None:
        await original(self, *args)
        if self.version == step:
            raise VerstError("crashed on purpose")

    original = Loop._after
    patch = pytest.MonkeyPatch()
    patch.setattr(Loop, "_after", crash)
    with pytest.raises(VerstError, match="crashed on purpose"):
        await run.go(placement)
    patch.undo()
