"""Models by their name on the Hugging Face hub, in place of a directory: `org/name` or `org/name@revision`.

A run records the commit that the name stood for when it began, and every process that needs the model looks in its machine's own cache
first and downloads what is not there. With the commit known, a cached model needs no network.
"""

from __future__ import annotations

import re
from pathlib import Path

from verst.config.schema import Config
from verst.errors import ModelError, first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]  # the same weights again, as other programs want them


def is_hub_id(path: str | Path) -> bool:
    """Whether it names a model on the hub: it has the form, and no directory here has that name."""
    return _HUB_ID.fullmatch(str(path)) is not None and not Path(path).exists()


def model_directory(path: str | Path) -> Path:
    """The directory of a model: `path` itself, or for a hub id its place in the hub's cache, downloaded if it is not there.

    Whether a directory exists and holds a model is for its reader to say. Raises `ModelError` if a hub id cannot be had, with the reason.
    """
    return _snapshot(str(path)) if is_hub_id(path) else Path(path).expanduser()


def pinned(path: str) -> str:
    """`path` as a run records it: a directory as an absolute path, a hub id with its commit. Raises as `model_directory`."""
    if not is_hub_id(path):
        return str(Path(path).expanduser().absolute())
    return f"{path.partition('@')[0]}@{_snapshot(path).name}"


def with_local_model(config: Config) -> Config:
    """The configuration with the model's directory on this machine as `model.path`. Raises as `model_directory`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(model_directory(config.model.path))})})


def _snapshot(name: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, ValueError, httpx.HTTPError) as error:
        where = f"model.path: {name} is no directory in {Path.cwd()}, and as a model of the hub"
        raise ModelError(f"{where} {_explained(error, name)}") from error


def _explained(error: Exception, name: str) -> str:
    """What became of a download, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = name.partition("@")
    page = f"{constants.ENDPOINT}/{repo}"
    token = "set HF_TOKEN, or log in with: hf auth login"
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its conditions at {page}, then {token}"
    if isinstance(error, RepositoryNotFoundError):
        return f"it is not there, or private: look at {page}; for a private one {token}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision}: {page}/tree/main lists branches, tags and commits"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"it cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}): make room, or set HF_HOME to another disk"
    wanted = f"{repo} --revision {revision}" if revision else repo
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(error)
    return (
        f"it is not whole in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached ({reason}). Where there is a "
        f"network: hf download {wanted} --local-dir DIR; copy DIR here, and set model.path=DIR"
    )
