"""Which variables are secrets, and that a process which takes them out of its environment shows none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from verst import secrets
from verst.config import hub
from verst.config.load import load_config
from verst.errors import ExtensionError
from verst.runtime.extensions import Extensions
from verst.runtime.rollout_worker import RolloutWorker
from verst.secrets import is_secret, require, without_secrets

TAKES = """
import os, subprocess, sys
from verst import secrets
from verst.isolated.process import worker_environment

secrets.take(["MY_TOKEN"])

def shown():
    return [name for name in ("HF_TOKEN", "JUDGE_API_KEY", "MY_TOKEN", "PLAIN") if "hidden-" + name in open("/proc/self/environ").read()]

assert shown() == ["MY_TOKEN", "PLAIN"], shown()
assert "HF_TOKEN" not in os.environ and os.environ["MY_TOKEN"] == "hidden-MY_TOKEN"
child = subprocess.run([sys.executable, "-c", "import os; print('HF_TOKEN' in os.environ)"], capture_output=True, text=True)
assert child.stdout == "False\\n", child
seen = worker_environment(secrets.environment(), ("JUDGE_API_KEY",))
assert seen["JUDGE_API_KEY"] == "hidden-JUDGE_API_KEY" and "HF_TOKEN" not in seen
assert secrets.value("HF_TOKEN") == "hidden-HF_TOKEN"
with secrets.lent():
    assert os.environ["HF_TOKEN"] == "hidden-HF_TOKEN"
    os.environ["NEW_KEY"] = "of the library"
assert "HF_TOKEN" not in os.environ and shown() == ["MY_TOKEN", "PLAIN"]
print("all well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_was_taken_is_in_no_environment_and_can_be_lent():
    names = ("HF_TOKEN", "JUDGE_API_KEY", "MY_TOKEN", "PLAIN")
    paths = {"PYTHONPATH": ":".join(sys.path)}
    given = {name: f"hidden-{name}" for name in names} | paths
    done = subprocess.run([sys.executable, "-c", TAKES], env=given, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("all well\n", 0), done.stderr


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"),
        *("AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "GOOGLE_APPLICATION_CREDENTIALS", "PGPASSWORD", "github_token", "SSH_AUTH_SOCK"),
    ],
)
def test_secrets_by_their_names(name: str):
    assert is_secret(name)
    assert without_secrets({name: "x", "HOME": "/h"}) == {"HOME": "/h"}
    assert without_secrets({name: "x"}, but=[name]) == {name: "x"}


@pytest.mark.parametrize("name", ["HOME", "PATH", "PWD", "LANG", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "RAY_JOB_ID"])
def test_what_is_no_secret(name: str):
    assert not is_secret(name)


def test_a_variable_that_the_run_names_must_be_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEARCH_KEY", "x")
    require(["SEARCH_KEY"])
    with pytest.raises(ExtensionError, match=r"run.secrets: OTHER_KEY is not set"):
        require(["SEARCH_KEY", "OTHER_KEY"])


async def test_the_hubs_token_is_lent_for_the_policy_and_for_the_teacher(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(secrets, "_taken", {"HF_TOKEN": "hidden"})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    downloads: list[tuple[str, str | None]] = []

    def snapshot(name: str) -> Path:
        downloads.append((name, os.environ.get("HF_TOKEN")))
        return tiny

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    values = {
        "run": {"steps": 1},
        "model": {"path": "org/policy"},
        "data": {"path": "unused", "max_prompt_tokens": 64},
        "rollout": {"max_new_tokens": 8},
        "algorithm": {"name": "distill", "teacher": "org/teacher"},
    }
    worker = RolloutWorker(load_config(values), Extensions(), 0, "cpu", tmp_path, teacher_device="cpu")
    await worker.start(False)
    await worker.close()
    assert downloads == [("org/policy", "hidden"), ("org/teacher", "hidden")]
    assert "HF_TOKEN" not in os.environ
