"""Models by their names on the hub: against a hub on this machine that answers as huggingface.co does, in processes of their own."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from verst.config.hub import is_hub_id, model_directory
from verst.config.load import load_config
from verst.runtime.rundir import RunDirectory

COMMIT = "5fae3e0d5ab1f2c9b37a1d7f0c6b4a8e9d2c1b00"
REPO = "org/tiny"
NOBODY = {"HF_ENDPOINT": "http://127.0.0.1:9"}


Reply = tuple[int, bytes, dict[str, str]]


class Hub(http.server.ThreadingHTTPServer):
    """Has one model, one that is gated, and nothing else."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        ids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
        about = _json({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        tree = _json([{"type": "file", "path": name, "size": len(data), "oid": ids[name]} for name, data in files.items()])
        model = f"/api/models/{REPO}"
        self._known: dict[str, Reply] = {
            **dict.fromkeys((model, f"{model}/revision/main", f"{model}/revision/{COMMIT}"), about),
            **{f"{model}/tree/{COMMIT}": tree, f"{model}/revision/v9": _refusal(404, "RevisionNotFound")},
            **{f"/{REPO}/resolve/{COMMIT}/{n}": (200, d, {"ETag": f'"{ids[n]}"', "X-Repo-Commit": COMMIT}) for n, d in files.items()},
            "/api/models/org/gated/revision/main": _refusal(403, "GatedRepo"),
        }

    def reply(self, path: str) -> Reply:
        self.asked.append(path)
        return self._known.get(path.partition("?")[0], _refusal(404, "RepoNotFound"))


def _json(value: Any) -> Reply:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _refusal(status: int, code: str) -> Reply:
    return status, b"", {"X-Error-Code": code, "X-Error-Message": code}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Hub)
        status, body, headers = self.server.reply(self.path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.is_file()}
    with Hub(files | {"model.bin": b"weights for other programs"}) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


def python(code: str, home: Path, hub: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its variables when it is imported."""
    variables = {
        **{"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(home), "HF_HOME": str(home)},
        **{"HF_ENDPOINT": hub, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        **environment,
    }
    return subprocess.run([sys.executable, "-c", code], cwd=home, env=variables, capture_output=True, text=True, timeout=200, check=False)


CREATE = f"""
from verst.config.load import load_config
from verst.runtime.rundir import RunDirectory
print(RunDirectory.create(load_config({{"run": {{"steps": 1}}, "model": {{"path": "{REPO}"}}}}), None, {{}}).root)
"""
READ = """
import sys
from verst.config.plan import read_model
from verst.data.chat import load_tokenizer
print(read_model("{0}").parameters, len(load_tokenizer("{0}")))
"""


@pytest.mark.slow
def test_a_run_records_the_commit_and_needs_no_network_after(tmp_path: Path, hub: Hub):
    created = python(CREATE, tmp_path, hub.url)
    assert created.returncode == 0, created.stderr
    _, config = RunDirectory.open(created.stdout.strip())
    assert config.model.path == f"{REPO}@{COMMIT}"
    assert not any("model.bin" in path for path in hub.asked if "/resolve/" in path)
    hub.asked.clear()
    read = python(READ.format(config.model.path), tmp_path, hub.url)
    assert read.returncode == 0, read.stderr
    assert not [path for path in hub.asked if REPO in path]
    assert int(read.stdout.split()[0]) > 0
    offline = python(READ.format(REPO), tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert offline.stdout == read.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("org/none", {}, "it is not there, or private: look at {hub}/org/none; for a private one set HF_TOKEN, or log in"),
        ("org/gated", {}, "it is gated: accept its conditions at {hub}/org/gated, then set HF_TOKEN"),
        ("org/tiny@v9", {}, "it has no revision v9: {hub}/org/tiny/tree/main lists"),
        (
            "org/tiny",
            {"HF_HUB_OFFLINE": "1"},
            "cannot be reached (HF_HUB_OFFLINE is set). Where there is a network: hf download org/tiny --local-dir DIR",
        ),
        (
            "org/tiny@v1",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "Where there is a network: hf download org/tiny --revision v1 --local-dir DIR",
        ),
        (f"org/tiny@{COMMIT}", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_told_with_what_to_do(tmp_path: Path, hub: Hub, name: str, environment: dict[str, str], message: str):
    code = f"from verst import cli; import sys; sys.exit(cli.main(['init', 'run.yaml', '--task', 'chain_sum', '--model', '{name}']))"
    done = python(code, tmp_path, hub.url, **environment)
    assert done.returncode == 1
    assert f"model.path: {name} is no directory in {tmp_path}, and as a model of the hub" in done.stderr
    assert message.format(hub=hub.url) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, hub: Hub):
    (tmp_path / "hub").write_text("a file where the cache should be")
    done = python(READ.format(REPO), tmp_path, hub.url)
    assert "cannot be stored in" in done.stderr
    assert "make room, or set HF_HOME to another disk" in done.stderr


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert [is_hub_id(name) for name in ("org/name", "org/name@main", "org/n.a-m_e@refs/pr/1")] == [True] * 3
    assert not any(map(is_hub_id, ("models/mine", "/org/name", "./org/name", "~/name", "a/b/c", "name", "org/name@", "../name")))
    assert model_directory("models/mine") == Path("models/mine")


def test_a_directory_is_recorded_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(tiny)
    run = RunDirectory.create(load_config({"run": {"steps": 1, "dir": str(tmp_path)}, "model": {"path": "models/mine"}}), None, {})
    assert RunDirectory.open(run.root)[1].model.path == str(tmp_path / "models" / "mine")
