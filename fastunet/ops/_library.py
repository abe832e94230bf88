"""The ``fastunet`` namespace of ``torch.library``, opened once."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TypeGuard

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
LIBRARY = torch.library.Library("fastunet", "DEF")

CastPolicy = Callable[[str, tuple[Tensor, ...]], torch.dtype]


def lower_precision(device: str, tensors: tuple[Tensor, ...]) -> torch.dtype:
    """The autocast dtype of ``device``, as matrix products and convolutions take."""
    return torch.get_autocast_dtype(device)


def float32(device: str, tensors: tuple[Tensor, ...]) -> torch.dtype:
    """float32, as losses take."""
    return torch.float32


def _is_cast(argument: object) -> TypeGuard[Tensor]:
    """Whether autocast changes ``argument``; it leaves float64 alone, as PyTorch's own does."""
    return (
        isinstance(argument, Tensor)
        and argument.is_floating_point()
        and argument.dtype != torch.float64
    )


def register_autocast(name: str, policy: CastPolicy) -> None:
    """Under autocast, cast the floating-point tensors given to operator ``name`` by ``policy``."""
    operator = getattr(torch.ops.fastunet, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(
            *args: object,
            device: str = device,
            excluded: torch._C.DispatchKeySet = excluded,
        ) -> object:
            floating = tuple(arg for arg in args if _is_cast(arg))
            if floating:
                dtype = policy(device, floating)
                args = tuple(arg.to(dtype) if _is_cast(arg) else arg for arg in args)
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(*args)

        LIBRARY.impl(name, cast, key)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call on these is seen by the operator alone.

    There are no gradients, no subclasses, and no autocast, transform, mode, tracing or compilation.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.is_autocast_enabled("cuda")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


# of an output: a pass over fewer takes a GPU less time than Python takes to launch its gradients
FEW_ELEMENTS = 1 << 25
_recordings = 0


@contextmanager
def recording() -> Iterator[None]:
    """Within, a CUDA graph is recorded, whose launches cost nothing later."""
    global _recordings
    _recordings += 1
    try:
        yield
    finally:
        _recordings -= 1


def waits_for_python(elements: int, *tensors: Tensor | None) -> bool:
    """Whether PyTorch's own operators, launched from C++, are faster for a call on ``tensors``.

    They are on a GPU, with gradients and an output of few ``elements``, unless it is recorded or
    compiled.
    """
    return (
        not torch.compiler.is_compiling()
        and elements < FEW_ELEMENTS
        and tensors[0] is not None
        and tensors[0].is_cuda
        and not _recordings
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
    )


def register_triton(name: str, module: str) -> None:
    """Let GPUs run operator ``name`` by ``<name>_triton`` of ``module``, where Triton is installed.

    The module is imported by the first call: it imports Triton, which takes longer than all else.
    """
    if not HAS_TRITON:
        return

    function: Callable[..., object] | None = None

    def launch(*args: object) -> object:
        nonlocal function
        if function is None:
            function = getattr(import_module(module), f"{name}_triton")
        device = next(arg.get_device() for arg in args if isinstance(arg, Tensor))
        # Triton launches on the current device
        if device == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    LIBRARY.impl(name, launch, "CUDA")
