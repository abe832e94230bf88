"""What launching a Triton kernel needs to know of the GPU. Imported only where Triton is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .conv_relu.tiles import Gpu

# launches that are remembered; networks have a few dozen a size of image
MOST_PLANS = 4096


@cache
def gpu(device: torch.device) -> Gpu:
    """The properties of ``device``; those of a small Hopper where kernels are interpreted."""
    if device.type != "cuda":
        return Gpu((9, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    capability = (0, 0) if torch.version.hip else (properties.major, properties.minor)
    return Gpu(capability, properties.multi_processor_count)


def signature(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All of ``tensors`` that choosing and launching a kernel depend on; not their addresses."""
    return tuple(
        [
            None
            if t is None
            else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16 == 0)
            for t in tensors
        ]
    )


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether 32 bits do not count the elements between the first and the last of one of them.

    Up to there kernels count in 32 bits: a GPU divides 64 bits in some hundred instructions.
    """
    return any(
        sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) >= 2**30
        for t in tensors
        if t is not None
    )


@dataclass(frozen=True)
class At:
    """Among a launch's arguments: a tensor, by its number."""

    number: int


@dataclass(frozen=True)
class Described:
    """Among a launch's arguments: a tensor, by its number, through a descriptor.

    Args:
        number: of the tensor.
        describe: makes its descriptor.
    """

    number: int
    describe: Callable[[Tensor], TensorDescriptor]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        grid: programs along up to three axes.
        arguments: in the kernel's order, as many as precede those that ``options`` name.
        options: constants by name, and Triton's own.
    """

    grid: tuple[int, ...]
    arguments: list[Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    run: Callable[..., None]
    arguments: list[Any]
    tensors: list[tuple[int, int]] = field(default_factory=list)
    descriptors: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)


class Launcher:
    """A kernel whose launches are prepared once for all tensors of the same ``signature``.

    Triton looks at each argument in each launch, which takes longer than small kernels run.

    Args:
        kernel: of ``triton.jit``.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def __call__(
        self,
        tensors: tuple[Tensor | None, ...],
        key: tuple[Any, ...],
        prepare: Callable[[], Launch],
        signed: tuple[Any, ...] | None = None,
    ) -> None:
        """Launch what ``prepare`` describes.

        Args:
            tensors: those that the arguments' numbers mean.
            key: all else that ``prepare`` depends on.
            prepare: called for what is new.
            signed: the signature of those tensors that all others follow from.
        """
        known = (key, signed or signature(*tensors))
        plan = self._plans.get(known)
        if plan is None:
            self._first(known, tensors, prepare())
            return
        arguments = plan.arguments.copy()
        for place, number in plan.tensors:
            arguments[place] = tensors[number]
        for place, number, fields in plan.descriptors:
            # what its constructor checks was checked when the plan was made
            descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__ = {**fields, "base": tensors[number]}
            arguments[place] = descriptor
        plan.run(*arguments)

    def _first(
        self, known: tuple[Any, ...], tensors: tuple[Tensor | None, ...], launch: Launch
    ) -> None:
        arguments = [
            tensors[a.number]
            if isinstance(a, At)
            else a.describe(_present(tensors[a.number]))
            if isinstance(a, Described)
            else a
            for a in launch.arguments
        ]
        compiled = self._kernel[launch.grid](*arguments, **launch.options)
        if compiled is None:
            # the interpreter
            return
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        names = self._kernel.arg_names[len(arguments) :]
        constants = [launch.options[name] for name in names]
        grid = (*launch.grid, 1, 1)[:3]
        plan = _Plan(compiled[grid], [None] * len(arguments) + constants)
        for place, (given, made) in enumerate(zip(launch.arguments, arguments, strict=True)):
            if isinstance(given, At):
                plan.tensors.append((place, given.number))
            elif isinstance(given, Described):
                fields = {k: v for k, v in vars(made).items() if k != "base"}
                plan.descriptors.append((place, given.number, fields))
            else:
                plan.arguments[place] = made
        self._plans[known] = plan


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
