"""What stands between `import megatron.core` and this machine: the package itself, its noise, and a CPU in place of CUDA.

Megatron-Core asks CUDA for devices, streams and random states in many places. Where CUDA is, nothing here is changed. Without CUDA,
`require` answers those questions with the CPU once, before the first import; tensors then lie on the CPU and gloo carries them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import typing_extensions
from torch.utils._device import _device_constructors

from verst.errors import ConfigError

INSTALL = "install it with `make stack` on a machine without a GPU, with `pip install 'verst[megatron]'` on one with a GPU"

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor", "eye", "linspace")
_LIKE_FACTORIES = ("zeros_like", "ones_like", "empty_like", "full_like")
# All that the backend uses, so that every module is imported while `torch.compile` does nothing.
_MODULES = (
    "megatron.core",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.moe.router_replay",
    "megatron.training.arguments",
    "megatron.training.training",
)


@functools.cache
def require() -> None:
    """Imports Megatron-Core. Raises `ConfigError` with the line that installs it if it is missing. Later calls cost nothing."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise ConfigError(f"train.backend megatron needs the package megatron-core, which is not installed here; {INSTALL}")
    if not hasattr(typing, "override"):  # Python 3.11; Megatron-Core takes it from typing
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-Core refuses tensor parallelism on Hopper GPUs without it
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it warns of its own deprecated defaults on every construction
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        if not torch.cuda.is_available():
            stack.enter_context(_no_compilation())
            _without_triton()
            _cpu_devices()
            _cpu_factories()
            _cpu_tensor_methods()
        for module in _MODULES:
            importlib.import_module(module)
        if not torch.cuda.is_available():
            _cpu_inside_megatron()
        importlib.import_module("verst.training.megatron.multi_tensor").install()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that Megatron-Core's own code sets off: about absent Apex, deprecated names, gloo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _no_compilation() -> Iterator[None]:
    """Megatron-Core decorates its functions with `torch.compile` as it is imported; on a CPU each would start a C++ compiler."""
    compile_ = torch.compile

    def unchanged(model: Any = None, **_: Any) -> Any:
        return model if model is not None else (lambda function: function)

    torch.compile = unchanged
    try:
        yield
    finally:
        torch.compile = compile_


def _without_triton() -> None:
    """One feature for GPUs (the paged stash) imports triton whether it is used or not."""
    if importlib.util.find_spec("triton") is None:
        stub: Any = type(sys)("megatron.core.transformer.moe.ops.paged_stash")
        stub.GLOBAL_BLOCK_SIZE, stub.paged_stash_copy_kernel, stub.paged_stash_pop_kernel = 1024, None, None
        sys.modules[stub.__name__] = stub


class _Stream:
    """Stands for every stream and event: on a CPU all work is done when its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, _: str) -> Callable[..., _Stream]:
        return lambda *_, **__: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0


class _Event(_Stream):
    pass


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _cpu_devices() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, functools.partial(_nothing))
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda *_, **__: stream
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    cuda.get_device_capability = lambda *_: (0, 0)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=0, minor=0, total_memory=0, multi_processor_count=1)
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push, cuda.nvtx.range_pop = functools.partial(_nothing), functools.partial(_nothing)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)


def _cpu_factories() -> None:
    # torch keeps a list of its own factories, by identity, for `with torch.device(...)`: it must be made before they are replaced,
    # or transformers, which builds models on "meta", would build them elsewhere.
    _device_constructors()
    for name in (*_FACTORIES, *_LIKE_FACTORIES):
        setattr(torch, name, _redirected(getattr(torch, name)))


def _redirected(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _cpu_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    type_ = torch.Tensor.type

    def named_as_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Megatron-Core's optimizer tells parameters apart by names such as "torch.cuda.FloatTensor"."""
        if dtype is not None:
            return type_(self, dtype, *args, **kwargs)
        name = type_(self)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if asked_by.startswith("megatron.core.optimizer") else name

    tensor.type = named_as_cuda


def _cpu_inside_megatron() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # Split sizes become numpy arrays only on their way from a GPU to the CPU; here they are on the CPU already.
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
