"""``weight_map`` and ``separate_touching``: schemas, who serves which device, public functions."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._check import bad_type, bad_value, describe
from .._library import LIBRARY
from .reference import separate_touching_reference, weight_map_reference

Labels = TypeVar("Labels", Tensor, "np.ndarray[Any, Any]")

# as the ids are compared and stored: kernels see int32 and int64 only
_ID_TYPES = {
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}
# their squares, times the longest axis squared, are normal float32 numbers
_LENGTHS = (1e-9, 1e9)
# steps along an axis are counted in float32
_LONGEST_AXIS = 1 << 24
_FLOAT32_MAX = torch.finfo(torch.float32).max

LIBRARY.define(
    "weight_map(Tensor labels, Tensor? class_weight, bool balanced, float w0, float sigma, "
    "float spacing_d, float spacing_h, float spacing_w, bool distances) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("separate_touching(Tensor labels, int width) -> Tensor")
LIBRARY.impl("weight_map", weight_map_reference, "CompositeExplicitAutograd")
LIBRARY.impl("separate_touching", separate_touching_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("fastunet::weight_map", lib=LIBRARY)
def _weight_map_fake(
    labels: Tensor,
    class_weight: Tensor | None,
    balanced: bool,
    w0: float,
    sigma: float,
    spacing_d: float,
    spacing_h: float,
    spacing_w: float,
    distances: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = labels.new_empty(labels.shape, dtype=torch.float32)
    d1, d2 = (weights.new_empty(labels.shape if distances else (0,)) for _ in range(2))
    return weights, d1, d2


@torch.library.register_fake("fastunet::separate_touching", lib=LIBRARY)
def _separate_touching_fake(labels: Tensor, width: int) -> Tensor:
    return labels.new_empty(labels.shape)


def weight_map(
    labels: Labels,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weight: str | Tensor | None = "balanced",
    spacing: float | Sequence[float] = 1.0,
    separate: int = 0,
    return_distances: bool = False,
) -> Any:
    """Weight each pixel so that the gap between touching cells is learnt.

        w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

    with d1, d2 the distances from x to its nearest and second nearest cell. As in the paper the
    border term counts at every pixel, inside cells (d1 = 0) too. Where there are fewer than two
    cells it is zero, the limit of a distance without end. Cells of one image of a batch know
    nothing of the others'.

    Args:
        labels: [H, W], [B, H, W], [D, H, W] or [B, D, H, W] of any integer dtype, a tensor on any
            device or a NumPy array. k > 0 is the k-th cell; ids need be neither consecutive nor
            connected. 0 and negative ids are background; uint64 is read as int64, so the ids from
            2^63, which some volumes use for "no label", are background too.
        w0: height of the border term, >= 0.
        sigma: width of the border term, in the unit of ``spacing``.
        class_weight: w_c. "balanced" gives background and cells of the whole batch the same total
            and the pixels a mean of 1, or is 1 where the batch has only one of the two; None is 1;
            a tensor [2] gives the weight of background and of cells.
        spacing: distance between neighbouring pixels. A number or two numbers (row, column) mean
            images, three (plane, row, column) volumes: this alone tells [B, H, W] from [D, H, W].
        separate: first carve this much background between touching cells, as ``separate_touching``
            does (in volumes along all three axes). Cells that touch leave no gap to be weighted.
        return_distances: also return d1 and d2. They are exact to any distance, so this is slower.
    Returns: float32 weights of the shape of ``labels``, on its device, or a NumPy array if
        ``labels`` is one; with ``return_distances`` a tuple (weights, d1, d2), in the unit of
        ``spacing``, inf where there is no such cell. Not differentiable. Equal inputs give equal
        bits, whatever the number of threads.
    Raises: TypeError if ``labels`` does not hold integers or another argument has a wrong type;
        ValueError for shapes and numbers that cannot work.
    Source: Ronneberger et al. 2015, equation 2.
    """
    tensor = _as_tensor("weight_map", labels)
    spacings = _spacings(spacing)
    volumes = _volumes("weight_map", tensor, len(spacings))
    if isinstance(class_weight, Tensor):
        if class_weight.shape != (2,) or class_weight.is_complex():
            want = "[2], the weights of background and of cells"
            raise bad_value("weight_map", "class_weight", want, describe(class_weight))
        given = class_weight.detach().to(volumes.device, torch.float32)
        balanced = False
    elif class_weight is None or class_weight == "balanced":
        given = None
        balanced = class_weight is not None
    else:
        raise bad_value("weight_map", "class_weight", '"balanced", None or a tensor', class_weight)
    if separate:
        volumes = torch.ops.fastunet.separate_touching(volumes, _width("separate", separate))
    outputs = torch.ops.fastunet.weight_map(
        volumes,
        given,
        balanced,
        _number("w0", w0, 0.0, _FLOAT32_MAX),
        _number("sigma", sigma, *_LENGTHS),
        *((1.0,) * (3 - len(spacings)) + spacings),
        return_distances,
    )
    wanted = tuple(output.view(tensor.shape) for output in outputs[: 3 if return_distances else 1])
    if not isinstance(labels, Tensor):
        wanted = tuple(output.numpy() for output in wanted)
    return wanted if return_distances else wanted[0]


def separate_touching(labels: Labels, width: int = 1) -> Labels:
    """Carve background between touching cells, so that there is a border to be weighted.

    A pixel of a cell becomes 0 where another cell has a pixel within ``width`` rows and ``width``
    columns of it (Chebyshev distance). Both sides give way: width 1 leaves a gap of two pixels.

    Args:
        labels: [H, W] or [B, H, W] of any integer dtype, a tensor on any device or a NumPy array;
            k > 0 is the k-th cell, anything else is no cell and stays as it is.
        width: pixels, >= 0.
    Returns: the labels that remain, in the shape and dtype of ``labels``; NumPy if ``labels`` is.
    Raises: TypeError if ``labels`` does not hold integers or ``width`` is none; ValueError if
        ``labels`` has another rank or ``width`` is negative.
    Source: Ronneberger et al. 2015, section 3, which separates the cells by morphology.
    """
    tensor = _as_tensor("separate_touching", labels)
    volumes = _volumes("separate_touching", tensor, 2)
    width = _width("width", width, "separate_touching")
    carved = torch.ops.fastunet.separate_touching(volumes, width).view(tensor.shape)
    carved = carved.to(tensor.dtype)
    return carved if isinstance(labels, Tensor) else carved.numpy()


def _as_tensor(operator: str, labels: object) -> Tensor:
    if isinstance(labels, np.ndarray):
        if labels.dtype.kind not in "iu":
            raise bad_type(operator, "labels", "of integer ids", labels.dtype)
        # a tensor can share neither foreign byte order, nor negative strides, nor read-only memory
        native = labels.astype(labels.dtype.newbyteorder("="), copy=not labels.flags.writeable)
        labels = torch.from_numpy(np.ascontiguousarray(native))
    if not isinstance(labels, Tensor):
        raise bad_type(operator, "labels", "a torch.Tensor or numpy.ndarray", type(labels).__name__)
    if labels.dtype not in _ID_TYPES:
        raise bad_type(operator, "labels", "of integer ids", describe(labels))
    return labels


def _volumes(operator: str, labels: Tensor, axes: int) -> Tensor:
    """[B, D, H, W] int32 or int64 of the labels, of which ``axes`` axes are space."""
    if labels.ndim not in (axes, axes + 1):
        want = "[H, W] or [B, H, W]" if axes == 2 else "[D, H, W] or [B, D, H, W]"
        if operator == "weight_map":
            want += f" with a spacing of {axes} axes"
        raise bad_value(operator, "labels", want, describe(labels))
    if max(labels.shape) > _LONGEST_AXIS:
        raise bad_value(operator, "labels", f"at most {_LONGEST_AXIS} long", describe(labels))
    volumes = labels.to(_ID_TYPES[labels.dtype])
    if labels.ndim == axes:
        volumes = volumes.unsqueeze(0)
    if axes == 2:
        volumes = volumes.unsqueeze(1)
    return volumes.contiguous()


def _spacings(spacing: object) -> tuple[float, ...]:
    values = spacing if isinstance(spacing, Sequence | np.ndarray) else (spacing, spacing)
    if len(values) not in (2, 3):
        raise bad_value("weight_map", "spacing", "a number, or one an axis (2 or 3)", spacing)
    return tuple(_number("spacing", value, *_LENGTHS) for value in values)


def _number(argument: str, value: object, smallest: float, largest: float) -> float:
    if not isinstance(value, int | float | np.integer | np.floating):
        raise bad_type("weight_map", argument, "a number", type(value).__name__)
    if not smallest <= value <= largest:
        raise bad_value("weight_map", argument, f"from {smallest:g} to {largest:g}", value)
    return float(value)


def _width(argument: str, value: object, operator: str = "weight_map") -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_type(operator, argument, "an int", type(value).__name__)
    if value < 0:
        raise bad_value(operator, argument, ">= 0", value)
    # wider than any axis is as wide as the longest
    return min(value, _LONGEST_AXIS)
