"""What a bench file is made of: a setting gives cases, and a case has inputs and contenders."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fastunet.unet import UNet

from .figure import PAPER_SIZE

OURS = "fastunet"
# the same kernels, recorded and launched together
RECORDED = f"{OURS}, CUDA graph"
EAGER_LAYOUTS = {"eager": "contiguous", "eager channels_last": "channels_last"}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# what a case's name may end in, after a comma
BACKWARD = ("forward + backward", "training step")
DIRECTIONS = ("forward", "prediction", *BACKWARD)

Inputs = dict[str, Tensor]
Call = Callable[[], tuple[Tensor, ...]]
Prepare = Callable[[Sequence[Inputs]], Sequence[Call]]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """What a run was asked for.

    Args:
        device: where fastunet and PyTorch run.
        dtypes: of the inputs; the network runs float16 and bfloat16 under autocast.
        sizes: heights and widths of the network's input in pixels; none for each file's own.
        batches: images; none for each file's own.
        quick: few cases, small sizes, and nothing that has to be compiled.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    quick: bool = False

    def device_of(self, contender: "Contender") -> torch.device:
        """Where ``contender`` runs."""
        return torch.device("cpu") if contender.on_host else self.device

    def shapes(self, full: Sequence[Shape], quick: Sequence[Shape]) -> list[Shape]:
        """Batch and size of each case, the important ones first.

        What was asked for takes the place of the file's own; of what was not, the first is taken.
        """
        own = quick if self.quick else full
        if not (self.sizes or self.batches):
            return list(own)
        batch, size = own[0]
        return [(b, n) for n in self.sizes or (size,) for b in self.batches or (batch,)]

    def layer_shapes(self, quick_size: int) -> list[Shape]:
        """Batch and size of the network whose layers are timed: figure 1's, on GPUs in batches."""
        batches = (1,) if self.device.type == "cpu" else (1, 16, 4)
        full = [(batch, PAPER_SIZE) for batch in batches]
        return self.network_shapes(full, quick=[(1, quick_size)])

    def network_shapes(self, full: Sequence[Shape], quick: Sequence[Shape]) -> list[Shape]:
        """The same, with each size taken up to the next that fits the paper's network."""
        with torch.device("meta"):
            fitting = UNet().fitting_size
        shapes = self.shapes(full, quick)
        return list(dict.fromkeys((batch, fitting(size)) for batch, size in shapes))


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name: as the table shows it.
        prepare: makes the calls that are timed, one for each set of inputs, on memory of its own.
        layout: memory format of the images it is given.
        backend: who computes; fastunet's is found out by watching it.
        trusted: plain code of PyTorch or scipy, whose error is the measure for the others'.
        skip: why it does not take part, or None.
        on_host: it runs on the CPU whatever the device.
    """

    name: str
    prepare: Prepare
    layout: str = "contiguous"
    backend: str = "torch"
    trusted: bool = False
    skip: str | None = None
    on_host: bool = False


@dataclass(frozen=True)
class Case:
    """One problem that all contenders solve.

    Args:
        operator: the bench file's name.
        name: sizes and direction, unique for an operator and dtype.
        dtype: of the results, whose rounding a contender is allowed; of integers there is none.
        inputs: makes them, the same at each call.
        exact: the results in float64.
        contenders: the first is the one that the others are compared with.
        moved_bytes: each input read once, each output written once; 0 if not counted.
        flops: operations, two a multiply-add; 0 where memory is all that counts.
        launches_count: as in ``Clock``.
    """

    operator: str
    name: str
    dtype: torch.dtype
    inputs: Callable[[], Inputs]
    exact: Callable[[Inputs], tuple[Tensor, ...]]
    contenders: tuple[Contender, ...]
    moved_bytes: int = 0
    flops: int = 0
    launches_count: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.operator, self.name, dtype_name(self.dtype)


def each(make: Callable[[Inputs], Call]) -> Prepare:
    """A ``Contender.prepare`` that treats each set of inputs alone."""
    return lambda sets: [make(inputs) for inputs in sets]


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that takes the next of ``calls`` each time."""
    turns = cycle(calls)
    return lambda: next(turns)()


def bind(
    function: Callable[..., Any],
    inputs: Inputs,
    leaves: Collection[str] = (),
    layout: str = "contiguous",
) -> Call:
    """A call of ``function(**inputs)``, with the gradients of ``leaves`` after its outputs.

    The gradient that comes in is 1 for a scalar, as a loss has it, and random otherwise, the same
    for each contender.
    """
    arguments = {
        name: _laid_out(tensor, layout).requires_grad_(name in leaves)
        for name, tensor in inputs.items()
    }
    if not leaves:
        return torch.no_grad()(lambda: _as_tuple(function(**arguments)))
    with torch.no_grad():
        outputs = _as_tuple(function(**arguments))
    # of values that every dtype holds, so that float64 sees the same
    incoming = [
        _laid_out(noise(output.shape, output.device, torch.bfloat16, seed=seed), layout).to(output)
        if output.ndim
        else torch.ones_like(output)
        for seed, output in enumerate(outputs)
    ]
    wanted = [arguments[name] for name in leaves]

    def call() -> tuple[Tensor, ...]:
        outputs = _as_tuple(function(**arguments))
        return (*outputs, *torch.autograd.grad(outputs, wanted, incoming))

    return call


def rivals(
    eager: Callable[..., Any],
    ours: Callable[..., Any],
    leaves: Collection[str],
    setting: Setting,
) -> tuple[Contender, ...]:
    """Eager PyTorch in both layouts, ``torch.compile`` of it in two modes, and fastunet."""

    def bound(function: Callable[..., Any], layout: str) -> Prepare:
        return each(lambda inputs: bind(function, inputs, leaves, layout))

    def compiled(mode: str | None) -> Prepare:
        def prepare(sets: Sequence[Inputs]) -> Sequence[Call]:
            function = torch.compile(eager, dynamic=False, mode=mode)
            return bound(function, "channels_last")(sets)

        return prepare

    return (
        *(
            Contender(name, bound(eager, layout), layout, trusted=True)
            for name, layout in EAGER_LAYOUTS.items()
        ),
        *compilations(compiled, setting),
        Contender(OURS, bound(ours, "channels_last"), "channels_last"),
    )


def compilations(
    compiled: Callable[[str | None], Prepare], setting: Setting
) -> tuple[Contender, ...]:
    """``torch.compile`` as it is and with max-autotune, by what ``compiled`` makes of a mode."""
    slow = "compiling takes longer than --quick allows" if setting.quick else None
    return tuple(
        Contender(name, compiled(mode), "channels_last", backend="inductor", skip=skip)
        for name, mode, skip in (
            ("torch.compile", None, slow),
            ("torch.compile max-autotune", "max-autotune", slow or why_no_gpu(setting)),
        )
    )


def why_no_gpu(setting: Setting) -> str | None:
    """Why a contender for GPUs takes no part, or None."""
    return None if setting.device.type == "cuda" else "compared on GPUs only"


def exactly(function: Callable[..., Any], leaves: Collection[str] = ()) -> Callable[[Inputs], Any]:
    """``function`` and its gradients in float64, as ``Case.exact``."""

    def exact(inputs: Inputs) -> tuple[Tensor, ...]:
        wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        return bind(function, wide, leaves)()

    return exact


def noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, *, seed: int) -> Tensor:
    """Normal random numbers, the same in each call on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """As tables and options have it: "float32"."""
    return str(dtype).removeprefix("torch.")


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    memory_format = MEMORY_FORMATS[layout] if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().clone(memory_format=memory_format)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
