"""What a contender must pass before it is timed: right results, by the path that it names."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet.ops import _amx, eager
from fastunet.ops.conv_relu import winograd_rule
from fastunet.ops.conv_relu.reference import is_channels_last

from .cases import BACKWARD, OURS, Call, Case, Contender, in_turn, noise
from .timing import Clock

# who computes, by the module that it is called from; of several that were called the first counts
PYTHON_BACKENDS = {
    "_amx": "amx",
    "winograd": "winograd",
    "triton_kernels": "triton",
    # an operator's own reference, not what else stands there
    "reference": "reference",
    "gpu": "cudnn",
    "few_channels": "cpp",
    "onednn": "onednn",
}

# operators whose calls on some devices are left to plain PyTorch
LEFT_TO_PYTORCH = ("conv_relu", "up_conv")

TF32_EPS = 2.0**-10
# of all results together
TINY = torch.finfo(torch.float32).eps
# relative change of inputs that an output by Winograd's algorithm may differ by
NUDGE = 2.0**-17


class RefusedError(Exception):
    """A contender may not be timed; the message says why."""


@dataclass(frozen=True)
class Trial:
    """A contender that was let in.

    Args:
        contender: which.
        call: one run of it, on the next of its sets of inputs.
        backend: who computes; for fastunet "reference", "cpp", "amx", "winograd", "onednn",
            "triton", "cudnn", "cuda" or, left to PyTorch's own operators, "pytorch"; by operator
            where they differ.
        errors: largest absolute error of each result.
        lengths: root of the sum of the squares of each result's errors.
    """

    contender: Contender
    call: Call
    backend: str
    errors: list[float]
    lengths: list[float]


class Judge:
    """Lets the contenders of one case be timed, or refuses them.

    A result of fastunet may be twice as wrong as the trusted contenders' and one rounding, as in
    the tests. Of others, and of ours by Winograd, for which tests have another bound, it is only
    asked that they compute the same: half of the digits agree. Where gradients pass a ReLU they
    agree as a whole, since an output in millions that rounds to its other side changes those
    around it; and no further than the exact ones stay where they are when inputs change a little.
    """

    def __init__(self, case: Case, clock: Clock) -> None:
        if "torch._dynamo" in sys.modules:
            # or the shapes of earlier cases would use up its limit, and this one would run eagerly
            torch.compiler.reset()
        self._inputs = case.inputs()
        self._copies = clock.copies(sum(tensor.nbytes for tensor in self._inputs.values()))
        self._exact_of = case.exact
        self._exact = case.exact(self._inputs)
        self._trials = {c.name: self._run(c) for c in case.contenders if c.trusted}
        rounding = torch.finfo(case.dtype).eps if case.dtype.is_floating_point else 0.0
        if case.flops and case.dtype == torch.float32 and _takes_tf32(self._exact[0].device):
            # whether the library's convolution rounds to it too differs from layer to layer
            rounding = TF32_EPS
        direction = case.name.rpartition(", ")[2]
        self._as_a_whole = case.flops > 0 and direction in BACKWARD
        # of a gradient that is zero, as of a bias before batch normalisation, all is rounding
        together = TINY * math.hypot(*map(_length, self._exact))
        self._strict, self._lenient = [], []
        for i, exact in enumerate(self._exact):
            error = max(trial.errors[i] for trial in self._trials.values())
            self._strict.append(2 * (error + rounding * _largest(exact)))
            if self._as_a_whole:
                length = max(trial.lengths[i] for trial in self._trials.values())
                self._lenient.append(max(2 * length, rounding**0.5 * _length(exact), together))
            else:
                self._lenient.append(max(self._strict[-1], rounding**0.5 * _largest(exact)))

    def admit(self, contender: Contender) -> Trial:
        """Run ``contender`` once.

        Raises: RefusedError if its results are wrong, or if a kernel is there and did not run.
        """
        trial = self._trials.get(contender.name) or self._run(contender)
        strict = contender.name == OURS and "winograd" not in trial.backend
        whole = self._as_a_whole and not strict
        found = trial.lengths if whole else trial.errors
        limits = self._strict if strict else self._lenient
        for i, (error, allowed) in enumerate(zip(found, limits, strict=True)):
            if whole and error > allowed:
                allowed = max(allowed, self._moved[i])
            # a NaN is in no order
            if not error <= allowed:
                off = f"{error:.2g} as a whole" if whole else f"{error:.2g}"
                raise RefusedError(f"result {i} is off by {off}, allowed {allowed:.2g}")
        return trial

    @cached_property
    def _moved(self) -> list[float]:
        """As ``Trial.lengths``, of the exact results of inputs that differ by ``NUDGE``."""
        nudged = {
            name: t.double() * (1 + NUDGE * noise(t.shape, t.device, torch.float64, seed=seed))
            if t.is_floating_point()
            else t
            for seed, (name, t) in enumerate(self._inputs.items())
        }
        return [
            _length(near - exact)
            for near, exact in zip(self._exact_of(nudged), self._exact, strict=True)
        ]

    def _run(self, contender: Contender) -> Trial:
        copies = 1 if contender.on_host else self._copies
        first, *others = contender.prepare([self._inputs] * copies)
        backend = contender.backend
        if contender.name == OURS:
            outputs, served = watch(first)
            backend = _named(served)
        else:
            outputs = first()
        shapes, exact_shapes = ([list(t.shape) for t in ts] for ts in (outputs, self._exact))
        if shapes != exact_shapes:
            raise RefusedError(f"results have shapes {shapes}, should have {exact_shapes}")
        errors, lengths = [], []
        for actual, exact in zip(outputs, self._exact, strict=True):
            off = actual.detach().to(exact) - exact
            errors.append(_largest(off))
            lengths.append(_length(off))
        for call in others:
            call()
        return Trial(contender, in_turn([first, *others]), backend, errors, lengths)


def watch(call: Call) -> tuple[tuple[Tensor, ...], dict[str, str]]:
    """Run ``call`` once and see who computed each of fastunet's operators in it.

    Returns: its outputs, and by operator who served, as in ``Trial.backend``.
    Raises: RefusedError if a kernel is registered for an operator and its reference ran, or if the
        processor has AMX, or a forward call suits Winograd's algorithm, and something else ran.
    """
    watcher = _Watcher()
    # backward runs on the watched thread, on a GPU too
    with (
        _left_to_pytorch(watcher.served),
        watcher,
        torch.autograd.set_multithreading_enabled(False),
    ):
        outputs = call()
    return outputs, watcher.served


@contextmanager
def _left_to_pytorch(served: dict[str, str]) -> Iterator[None]:
    """Within, the calls that our operators leave to plain PyTorch are written down."""
    functions = {name: getattr(eager, name) for name in LEFT_TO_PYTORCH}

    def noted(name: str) -> Callable[..., Any]:
        def function(*args: Any, **options: Any) -> Any:
            served[name] = "pytorch"
            return functions[name](*args, **options)

        return function

    for name in functions:
        setattr(eager, name, noted(name))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(eager, name, function)


class _Watcher(TorchDispatchMode):
    """Looks under fastunet's operators for the Python function that serves, if it is Python."""

    def __init__(self) -> None:
        super().__init__()
        self.served: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        qualified = func._schema.name
        if not qualified.startswith("fastunet::"):
            return func(*args, **kwargs)
        name = qualified.removeprefix("fastunet::")
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        called: set[str] = set()

        def note(frame: FrameType, event: str, _: object) -> None:
            folder, _, module = frame.f_globals.get("__name__", "").rpartition(".")
            name_of_call = frame.f_code.co_name.lstrip("_")
            if event != "call" or name_of_call.startswith(("unsupported", "why_not")):
                return
            if folder.endswith(".crop_concat") and not name.startswith("crop_concat"):
                # what a convolution by the library reads
                return
            if frame.f_code.co_name == f"{name}_reference":
                called.add("reference")
            elif module in PYTHON_BACKENDS and module != "reference":
                called.add(PYTHON_BACKENDS[module])

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            result = func(*args, **kwargs)
        finally:
            sys.setprofile(before)
        native = {"cpu": "cpp"}.get(device, device)
        ran = next((who for who in PYTHON_BACKENDS.values() if who in called), native)
        if device == "cpu" and ran != "amx" and _amx_takes(name, args):
            raise RefusedError(f"{name}: this processor's AMX takes the call, but {ran} ran")
        if device == "cpu" and ran != "winograd" and _winograd_takes(name, args):
            raise RefusedError(f"{name}: Winograd's algorithm takes the call, but {ran} ran")
        if ran == "reference" and torch._C._dispatch_has_kernel_for_dispatch_key(
            qualified, device.upper()
        ):
            raise RefusedError(f"{name}: a {device} kernel is there, but the reference ran")
        # in a network, the rounding of one of many calls is that of the result
        if self.served.get(name) != "winograd":
            self.served[name] = ran
        return result


def _takes_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cudnn.allow_tf32


def _amx_takes(name: str, args: Sequence[Any]) -> bool:
    """Whether an operator's call is one for AMX, told apart from what the operator itself finds."""
    if _amx.why_not_here():
        return False
    if name in ("conv_relu", "conv_relu_pool", "conv3x3"):
        source, weight, needs_it = args[0], args[1], True
    elif name == "conv_relu_bwd":
        source, weight, needs_it = args[0], args[4], args[7][0]
    else:
        return False
    wide = source.shape[1] >= _amx.FEW_CHANNELS and max(weight.shape[:2]) > _amx.NARROW
    return needs_it and wide and source.dtype == weight.dtype == torch.bfloat16


def _winograd_takes(name: str, args: Sequence[Any]) -> bool:
    """Whether a forward call is one for Winograd's algorithm, by its rule."""
    if name not in ("conv_relu", "conv_relu_pool", "conv3x3"):
        return False
    x, weight, _, padding, skip = args[:5]
    rejected = winograd_rule.unsupported("forward", x, weight, padding)
    return not rejected and is_channels_last(x, weight, skip)


def _named(served: dict[str, str]) -> str:
    if not served:
        raise RefusedError("none of fastunet's operators ran")
    backends = set(served.values())
    if len(backends) == 1:
        return backends.pop()
    return ", ".join(f"{name} {backend}" for name, backend in sorted(served.items()))


def _length(tensor: Tensor) -> float:
    """The root of the sum of the squares."""
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
