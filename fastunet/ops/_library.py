"""The ``fastunet`` namespace of ``torch.library``, opened once."""

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastunet", "DEF")

CastPolicy = Callable[[str, tuple[Tensor, ...]], torch.dtype]


def lower_precision(device: str, tensors: tuple[Tensor, ...]) -> torch.dtype:
    """The autocast dtype of ``device``, as matrix products and convolutions take."""
    return torch.get_autocast_dtype(device)


def float32(device: str, tensors: tuple[Tensor, ...]) -> torch.dtype:
    """float32, as losses take."""
    return torch.float32


def widest(device: str, tensors: tuple[Tensor, ...]) -> torch.dtype:
    """The widest dtype among ``tensors``, as concatenations take."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def register_autocast(name: str, policy: CastPolicy) -> None:
    """Cast the floating-point tensors given to operator ``name`` as ``policy`` says under autocast."""
    operator = getattr(torch.ops.fastunet, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(
            *args: object,
            device: str = device,
            excluded: torch._C.DispatchKeySet = excluded,
        ) -> object:
            floating = tuple(
                arg
                for arg in args
                if isinstance(arg, Tensor)
                and arg.is_floating_point()
                and arg.dtype != torch.float64
            )
            if floating:
                dtype = policy(device, floating)
                args = tuple(
                    arg.to(dtype) if any(arg is tensor for tensor in floating) else arg
                    for arg in args
                )
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(*args)

        LIBRARY.impl(name, cast, key)
