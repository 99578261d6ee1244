"""The contract of a model spec, to be run on one's own in one call; `verst.testing` has it under the same name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.model_spec import install, published_name

if TYPE_CHECKING:
    import torch

_TOKENS = 12


def check_model_spec(spec: Any, directory: str | Path) -> list[str]:
    """The contract of a model spec, run on yours with a model of that kind, small enough for a CPU. Returns the names it publishes.

    The published names are one-to-one, and those of the files, with their shapes; the `fsdp` backend's log-probabilities are those of the
    model's own logits; the `hf` engine generates as the model's own attention does, and takes what the trainer publishes; what is exported
    is read back bit for bit; routers are where `moe` says.

    Args:
        spec: the object or class, or a reference as in `model.spec`.
        directory: with config.json, weights (*.safetensors) and tokenizer, as for `model.path`. Random weights will do, but no zeros.

    Raises `ExtensionError` for what is no spec, or has two parameters of one name, `ModelError` or `EngineFailure` for what backend or
    engine cannot use, and `AssertionError` with what was expected for all else.
    """
    import torch

    from verst.training.model import load_model

    path = Path(directory)
    install(spec)
    model = load_model(str(path), torch.float32)
    published = _published(model)
    _check_names(model, path, published)
    _check_logprobs(model, path)
    _check_roundtrip(path, published)
    _check_engine(path, published)
    return list(published)


def _published(model: Any) -> dict[str, torch.Tensor]:
    """As the trainer publishes it: tied parameters once."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved)]
    return {published_name(model, name): tensor.detach() for name, tensor in named}


def _check_names(model: Any, path: Path, published: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    from verst.weights.names import parts

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    tied = {published_name(model, name) for name in model.state_dict()} - published.keys()
    expected = {part: shape for name, tensor in published.items() for part, _, shape in parts(name, tuple(tensor.shape))}
    whole = {name: tuple(tensor.shape) for name, tensor in published.items()}
    found = {name: shape for name, shape in shapes.items() if name not in tied}
    wanted = whole if found.keys() == whole.keys() else expected
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    assert not missing, f"expected {missing[0]} in the files of {path}, as checkpoint_name says; they have {unknown[:4] or 'nothing else'}"
    assert not unknown, f"expected a parameter for {unknown[0]} in the files of {path}: no checkpoint_name leads there"
    for name, shape in found.items():
        assert shape == wanted[name], f"expected {name} to have the shape {wanted[name]}, but in the files it has {shape}"


def _check_logprobs(model: Any, path: Path) -> None:
    """The trainer's path, which computes logits of chosen places only, against the model's own forward pass."""
    import torch

    from verst.routing.tap import tap_of
    from verst.training.model import Policy

    tokens = torch.arange(_TOKENS)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        own = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0].float(), -1)
        policy = Policy(model, str(path))
        assert policy.layers, "expected a decoder with layers"
        found, _ = policy(tokens, torch.arange(_TOKENS - 1), tokens[0, 1:], 1.0)
    expected = own[:-1].gather(-1, tokens[0, 1:, None])[:, 0]
    difference = float((found - expected).abs().max())
    assert difference < 1e-4, f"expected the trainer's log-probabilities to be those of the model's logits; they differ by {difference:.1e}"
    tap_of(model, model.config.get_text_config().to_dict())  # finds each router, or raises


def _check_roundtrip(path: Path, published: dict[str, torch.Tensor]) -> None:
    import torch

    from verst.training.export import export_model
    from verst.training.model import load_model

    with tempfile.TemporaryDirectory() as place:
        exported = Path(place) / "exported"
        export_model(path, {name: tensor.clone() for name, tensor in published.items()}, exported)
        again = _published(load_model(str(exported), torch.float32))
    other = sorted(name for name, tensor in published.items() if name not in again or not torch.equal(tensor, again[name]))
    assert not other, f"expected {other[0] if other else ''} to be read back as it was exported"


def _check_engine(path: Path, published: dict[str, torch.Tensor]) -> None:
    import torch

    from verst.rollout.hf.model import SlotModel
    from verst.rollout.hf.weights import check_manifest, load_weights
    from verst.weights.files import FileUpdate, publish

    slots = SlotModel(str(path), torch.float32, torch.device("cpu"), slots=4, max_tokens=_TOKENS + 4, exact=False)
    with tempfile.TemporaryDirectory() as place:
        changed = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in published.items()}
        manifest = publish(1, iter(changed.items()), place)
        check_manifest(slots.model, manifest)
        load_weights(slots.model, FileUpdate(manifest))
    held = _published(slots.model)
    other = sorted(name for name, tensor in changed.items() if not torch.equal(held[name], tensor))
    assert not other, f"expected the engine to hold {other[0] if other else ''} as it was published"
