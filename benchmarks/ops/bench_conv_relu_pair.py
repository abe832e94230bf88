"""conv_relu_pair: the two blue arrows of each level of figure 1."""

from functools import partial
from itertools import pairwise

import torch

from fastunet import ops

from ..cases import Case, Setting, exactly, rivals
from ..figure import Arrow, arrows
from .bench_conv_relu import noisy_layer

# the deepest level and the last concatenation
QUICK_LEVELS = (4, 8)


def cases(setting: Setting) -> list[Case]:
    """The pairs on the way down and up with all gradients: forward it is conv_relu twice."""
    return [
        _case(first, second, batch, dtype, setting)
        for batch, size in setting.layer_shapes(quick_size=220)
        for dtype in setting.dtypes
        for i, (first, second) in enumerate(_pairs(size))
        if i in QUICK_LEVELS or not setting.quick
    ]


def _pairs(size: int) -> list[tuple[Arrow, Arrow]]:
    convolutions = [arrow for arrow in arrows(size) if arrow.kind == "conv"]
    return list(pairwise(convolutions))[::2]


def _case(first: Arrow, second: Arrow, batch: int, dtype: torch.dtype, setting: Setting) -> Case:
    c_all = first.c_skip + first.c_in
    shapes = {
        "x": (batch, first.c_in, first.size, first.size),
        "weight1": (first.c_out, c_all, 3, 3),
        "bias1": (first.c_out,),
        "weight2": (second.c_out, second.c_in, 3, 3),
        "bias2": (second.c_out,),
    }
    if first.c_skip:
        shapes["skip"] = (batch, first.c_skip, first.skip_size, first.skip_size)

    # the image itself needs no gradient
    leaves = [name for name in shapes if name != "x" or first.c_in > 1]
    eager = partial(ops.eager.conv_relu_pair, pool=second.pool)
    ours = partial(ops.conv_relu_pair, pool=second.pool)
    pool = " + pool" if second.pool else ""
    return Case(
        operator="conv_relu_pair",
        name=f"{batch} x {first.channels} -> {first.c_out} -> {second.c_out}, "
        f"{first.size}x{first.size}{pool}, forward + backward",
        dtype=dtype,
        inputs=lambda: noisy_layer(shapes, setting.device, dtype),
        exact=exactly(eager, leaves),
        contenders=rivals(eager, ours, leaves, setting),
        flops=batch * ((2 + ("x" in leaves)) * first.flops + 3 * second.flops),
    )
