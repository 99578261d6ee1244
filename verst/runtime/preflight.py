"""Finds what is wrong with a run before any process is started for it."""

from __future__ import annotations

from verst.algorithms.table import algorithm_for
from verst.config.plan import read_model
from verst.config.schema import Config
from verst.data.sources import open_source
from verst.data.stream import PromptStream
from verst.errors import ConfigError
from verst.runtime.extensions import Extensions


def preflight(config: Config, extensions: Extensions) -> None:
    """Reads the model's headers and the first prompt. Loads no weights and imports neither torch nor the user's modules.

    Raises:
        VerstError: what is missing or malformed.
    """
    read_model(config.model.path)
    prompt = PromptStream(open_source(config.data, extensions.rows), config.data, seed=config.run.seed, split="train").next()
    if algorithm_for(config.algorithm).learns_from == "demonstrations" and not prompt.demonstration:
        raise ConfigError(
            f"algorithm {config.algorithm.name} learns from demonstrations, but {prompt.id} has none: "
            "set data.demonstration_column to the column with the answers"
        )
