"""A model spec on the megatron backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.test_model_spec import Plain
from verst import model_spec
from verst.errors import ModelError
from verst.model_spec import install
from verst.training.megatron.table.families import FAMILIES, family_of


def test_the_table_for_megatron_is_the_specs_to_give(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_spec, "_INSTALLED", {})

    class WithTable(Plain):
        def megatron_family(self) -> Any:
            return FAMILIES["llama"]

    with pytest.raises(ModelError, match=r"or have a model\.spec give it"):
        family_of(SimpleNamespace(model_type="plain_spec"), "here")
    install(WithTable)
    assert family_of(SimpleNamespace(model_type="plain_spec"), "here") is FAMILIES["llama"]
