"""Published tensors and the checkpoint tensors inside them.

transformers keeps the experts of a layer in two fused parameters, a checkpoint one tensor for each expert and matrix. The fsdp backend
publishes the former, the megatron backend the latter. SGLang loads checkpoints, so a fused tensor is handed to it as views of its parts;
the hf engine has fused parameters, and takes a part as what goes into such a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_GATE_UP = ".experts.gate_up_proj"
_DOWN = ".experts.down_proj"

Part = tuple[int | slice, ...]


def parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Part, tuple[int, ...]]]:
    """Checkpoint name, index into the published tensor, and shape of each part; the tensor itself if it is not fused.

    `gate_up_proj` is `[experts, 2 · intermediate, hidden]`, gate first; `down_proj` `[experts, hidden, intermediate]`.
    """
    if len(shape) == 3 and name.endswith(_GATE_UP):
        stem, half = name.removesuffix("gate_up_proj"), shape[1] // 2
        for expert in range(shape[0]):
            yield f"{stem}{expert}.gate_proj.weight", (expert, slice(0, half)), (half, shape[2])
            yield f"{stem}{expert}.up_proj.weight", (expert, slice(half, 2 * half)), (half, shape[2])
    elif len(shape) == 3 and name.endswith(_DOWN):
        stem = name.removesuffix("down_proj")
        for expert in range(shape[0]):
            yield f"{stem}{expert}.down_proj.weight", (expert,), shape[1:]
    else:
        yield name, (), shape


def unpublished(names: Mapping[str, tuple[int, ...]], published: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Checkpoint tensors that no published tensor holds."""
    return names.keys() - {part for name, shape in published.items() for part, _, _ in parts(name, shape)}
