"""conv_relu: the blue arrows of figure 1, with the concatenation they read and the pooled copy."""

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import ops

from ..cases import (
    Case,
    Contender,
    Inputs,
    Setting,
    bind,
    each,
    exactly,
    noise,
    rivals,
    why_no_gpu,
)
from ..figure import Arrow, arrows

# the first arrow, the largest, one of the middle, the deepest, the last concatenation
QUICK_FORWARD = (0, 1, 5, 9, 16)
QUICK_BACKWARD = (5, 16)


def cases(setting: Setting) -> list[Case]:
    """The convolutions of the paper's network, forward alone and with all gradients."""
    return [
        _case(arrow, batch, dtype, backward, setting)
        for batch, size in setting.layer_shapes(quick_size=220)
        for dtype in setting.dtypes
        for backward, few in ((False, QUICK_FORWARD), (True, QUICK_BACKWARD))
        for i, arrow in enumerate(a for a in arrows(size) if a.kind == "conv")
        if i in few or not setting.quick
    ]


def _case(arrow: Arrow, batch: int, dtype: torch.dtype, backward: bool, setting: Setting) -> Case:
    shapes = _shapes(arrow, batch)

    # the image itself needs no gradient
    leaves = [name for name in shapes if backward and (name != "x" or arrow.c_in > 1)]
    eager = partial(ops.eager.conv_relu, pool=arrow.pool)
    ours = partial(ops.conv_relu, pool=arrow.pool)
    passes = 1 + sum(name in leaves for name in ("x", "weight"))
    return Case(
        operator="conv_relu",
        name=_name(arrow, batch) + (", forward + backward" if backward else ", forward"),
        dtype=dtype,
        inputs=lambda: noisy_layer(shapes, setting.device, dtype),
        exact=exactly(eager, leaves),
        contenders=(*rivals(eager, ours, leaves, setting), _library(arrow, leaves, setting)),
        moved_bytes=_elements(arrow, batch, leaves) * dtype.itemsize,
        flops=passes * batch * arrow.flops,
    )


def noisy_layer(
    shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Noise in ``shapes``; weights are scaled so that outputs are as large as inputs."""
    given = {
        name: noise(shape, device, dtype, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in given:
        if name.startswith("weight"):
            given[name] *= (2 / prod(shapes[name][1:])) ** 0.5
    return given


def _library(arrow: Arrow, leaves: list[str], setting: Setting) -> Contender:
    """cuDNN's convolution with bias and ReLU, which has no gradient."""

    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        source = x if skip is None else ops.eager.crop_concat(skip, x)
        y = torch.cudnn_convolution_relu(source, weight, bias, [1, 1], [0, 0], [1, 1], 1)
        return (y, F.max_pool2d(y, 2)) if arrow.pool else (y,)

    return Contender(
        "cudnn_convolution_relu",
        each(lambda inputs: bind(convolve, inputs, layout="channels_last")),
        "channels_last",
        backend="cudnn",
        skip=why_no_gpu(setting) or ("it has no gradient" if leaves else None),
    )


def _shapes(arrow: Arrow, batch: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, arrow.c_in, arrow.size, arrow.size),
        "weight": (arrow.c_out, arrow.c_skip + arrow.c_in, 3, 3),
        "bias": (arrow.c_out,),
    }
    if arrow.c_skip:
        shapes["skip"] = (batch, arrow.c_skip, arrow.skip_size, arrow.skip_size)
    return shapes


def _elements(arrow: Arrow, batch: int, leaves: list[str]) -> int:
    """Elements that must be read and written if each is touched once a pass."""
    shapes = _shapes(arrow, batch)
    y = batch * arrow.c_out * (arrow.size - 2) ** 2
    results = y + (y // 4 if arrow.pool else 0)
    source = batch * (arrow.c_skip + arrow.c_in) * arrow.size**2
    forward = source + prod(shapes["weight"]) + arrow.c_out + results
    if not leaves:
        return forward
    # incoming gradients, the mask, what was convolved, the weights; then the gradients
    backward = results + y + source + prod(shapes["weight"])
    return forward + backward + sum(prod(shapes[name]) for name in leaves)


def _name(arrow: Arrow, batch: int) -> str:
    pool = " + pool" if arrow.pool else ""
    return f"{batch} x {arrow.channels} -> {arrow.c_out}, {arrow.size}x{arrow.size}{pool}"
