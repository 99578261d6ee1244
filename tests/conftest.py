"""What is made once for all tests of a process: models on disk, and SGLang servers, whose start takes 40 s of processor time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.contracts.sglang_server import SharedServer


@pytest.fixture(scope="module")
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """For all runs of a module: starting one for each is what would take time."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=1 << 28)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny random model by the name of its config, with a tokenizer whose token n reads "wn"."""
    from tests.contracts.engine_cases import SAVED, save_model, words

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_model(tmp_path_factory.mktemp(name), SAVED[name])
            words().save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def servers(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], SharedServer]]:
    """An SGLang server by the name of its model, started when it is first needed. It has the weights that the last test left."""
    from tests.contracts.sglang_server import SERVED, shared_server

    running: dict[str, SharedServer] = {}
    with ExitStack() as stack:

        def serve(model: str) -> SharedServer:
            if model not in running:
                directory = tmp_path_factory.mktemp(f"sglang_{model}")
                running[model] = stack.enter_context(shared_server(models(model), directory, **SERVED[model]))
            return running[model]

        yield serve
