"""A model that transformers does not know: built, trained, published and exported by its spec."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.loop.local import local_run
from tests.loop.test_run import ROWS, vowels
from verst import model_spec
from verst.config.load import load_config
from verst.errors import ConfigError, ExtensionError, ModelError
from verst.model_spec import install, installed
from verst.protocols import ModelSpec
from verst.routing.kinds import moe_layers, routed_experts
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import preflight
from verst.testing import check_model_spec, tiny_model
from verst.types import RoutedExperts

EXAMPLES = Path(__file__).parents[2] / "examples/models"
pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(model_spec, "_INSTALLED", {})
    yield
    sys.modules.pop("gated", None)


def saved(directory: Path, spec: Any) -> Path:
    """A tiny model of a spec's kind, with the names of its files and weights that are neither 0 nor 1."""

    def kind(config: Any) -> Any:
        about = {
            name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures", "transformers_version")
        }
        model = spec.model_class(spec.config_class(**about))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.2, 0.3)
        return model

    path = tiny_model(directory, kind=kind)
    file = path / "model.safetensors"
    tensors = {spec.checkpoint_name(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(EXAMPLES)
    return saved(tmp_path / "gated", install("gated:Spec"))


def test_the_example_keeps_the_contract(gated: Path):
    assert len((EXAMPLES / "gated.py").read_text().splitlines()) <= 30
    names = check_model_spec("gated:Spec", gated)
    assert "model.layers.1.self_attn.output_gate.weight" in names
    assert not [name for name in names if name.endswith("self_attn.gate")]


async def test_the_example_is_trained_and_exported(gated: Path, tmp_path: Path):
    values = {"model": {"path": str(gated), "spec": "gated:Spec"}, "run": {"steps": 1}}
    run = await local_run(tmp_path, gated, values, reward=vowels, prompts=ROWS).go()
    assert max(run.metric("mismatch/abs_max")) == 0  # engine and trainer agree to the bit, as for any other model
    assert min(run.metric("update/grad_norm")) > 0
    before, after = load_file(gated / "model.safetensors"), load_file(run.run.final / "model.safetensors")
    assert before.keys() == after.keys()
    name = "model.layers.0.self_attn.output_gate.weight"
    assert not torch.equal(before[name], after[name])
    check_model_spec("gated:Spec", run.run.final)


def test_without_its_spec_the_model_is_refused(gated: Path):
    from verst.training.model import load_model

    model_spec._INSTALLED.clear()
    with pytest.raises(ModelError, match=r"no fitting tensor for model\.layers\.0\.self_attn\.gate"):
        load_model(str(gated), torch.float32)


class PlainConfig(LlamaConfig):
    model_type = "plain_spec"


class PlainLlama(LlamaForCausalLM):
    config_class = PlainConfig


class Plain(ModelSpec):
    model_type, config_class, model_class = "plain_spec", PlainConfig, PlainLlama


class Lossy(Plain):
    def checkpoint_name(self, parameter: str) -> str:
        return parameter.replace("q_proj", "k_proj")


class Elsewhere(Plain):
    def checkpoint_name(self, parameter: str) -> str:
        return f"decoder.{parameter}"


class Scaled(PlainLlama):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return output if kwargs.get("use_cache") or kwargs["input_ids"].shape[1] == 2 else type(output)(logits=2 * cast(Any, output.logits))


class TwoPaths(Plain):
    model_class = Scaled


def test_breaches_of_the_contract_are_told(tmp_path: Path):
    path = saved(tmp_path / "plain", Plain())
    assert check_model_spec(Plain, path)[0] == "model.embed_tokens.weight"
    with pytest.raises(ExtensionError, match=r"gives several parameters the name model\.layers\.0\.self_attn\.k_proj\.weight"):
        check_model_spec(Lossy, path)
    with pytest.raises(AssertionError, match=r"expected decoder\.lm_head\.weight in the files of .*, as checkpoint_name says"):
        check_model_spec(Elsewhere, path)
    with pytest.raises(AssertionError, match="expected the trainer's log-probabilities to be those of the model's logits"):
        check_model_spec(TwoPaths, path)
    more = load_file(path / "model.safetensors") | {"model.extra": torch.ones(2)}
    save_file(more, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"expected a parameter for model\.extra"):
        check_model_spec(Plain, path)


class RoutesConfig(MixtralConfig):
    model_type = "routes_spec"


class RoutesModel(MixtralForCausalLM):
    config_class = RoutesConfig


class Routes(ModelSpec):
    model_type, config_class, model_class = "routes_spec", RoutesConfig, RoutesModel

    def moe(self, config: Any) -> Any:
        return (1, 3), config["pool"], 2


def test_how_it_routes_is_the_specs_to_say():
    about = {"model_type": "routes_spec", "num_hidden_layers": 4, "pool": 8}
    assert routed_experts(about) is None
    install(Routes)
    assert routed_experts(about) == RoutedExperts(2, 8, 2)
    assert moe_layers(about) == (1, 3)


def test_what_is_no_spec_is_refused_with_what_is_expected():
    with pytest.raises(ExtensionError, match=r"has no model_type, or one that is no text; expected: an object, or a class"):
        install(object())
    half = SimpleNamespace(model_type="plain_spec", config_class=PlainConfig, model_class=PlainLlama)
    with pytest.raises(ExtensionError, match="has no method 'checkpoint_name': make it a subclass"):
        install(half)
    other = type("Other", (Plain,), {"model_type": "other"})
    with pytest.raises(ExtensionError, match="its config_class has the model_type 'plain_spec', not 'other'"):
        install(other)
    unlike = type("Unlike", (Plain,), {"model_class": LlamaForCausalLM})
    with pytest.raises(ExtensionError, match="write `config_class = PlainConfig` in it"):
        install(unlike)
    takes_none = type("TakesNone", (Plain,), {"checkpoint_name": lambda self: ""})
    with pytest.raises(ExtensionError, match=r"cannot be called as .*\(parameter\)"):
        install(takes_none)
    assert install(None) is None
    assert installed("plain_spec") is None
    assert install(Plain) is install(Plain)


def test_a_run_file_names_a_spec_that_can_be_found(tiny: Path, prompts: Path):
    values = {"run": {"steps": 1}, "model": {"path": str(tiny), "spec": "no_such_module:Spec"}, "data": {"path": str(prompts)}}
    with pytest.raises(ExtensionError, match="model spec 'no_such_module:Spec': no module 'no_such_module'"):
        preflight(load_config(values), Extensions())
    with pytest.raises(ConfigError, match=r"model\.spec"):
        load_config(values | {"model": {"path": str(tiny), "spec": ""}})
