"""The families that have a table, by the `model_type` of config.json.

Adding a family is one file beside this one, its line in `FAMILIES`, and one fixture in `tests/stack/megatron_cases.py`.
"""

from __future__ import annotations

from typing import Any

from verst.errors import ModelError
from verst.model_spec import installed
from verst.training.megatron.table import deepseek_v3, llama, qwen3, qwen3_moe
from verst.training.megatron.table.rows import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
}
"""By `model_type` of config.json."""


def family_of(hf_config: Any, path: str) -> Family:
    """The family's table. Raises `ModelError` if there is none."""
    spec = installed(hf_config.model_type)
    family = (spec.megatron_family() if spec is not None else None) or FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ModelError(
            f"model.path {path}: train.backend megatron has no table for model_type {hf_config.model_type!r}; there are: "
            f"{', '.join(FAMILIES)}. train.backend fsdp trains any transformers model; to add a family, write "
            "verst/training/megatron/table/FAMILY.py as its neighbours are, or have a model.spec give it"
        )
    return family
