"""up_conv: the green arrows of figure 1."""

from math import prod

import torch

from fastunet import ops

from ..cases import Case, Inputs, Setting, exactly, noise, rivals
from ..figure import Arrow, arrows

LEAVES = ("x", "weight", "bias")
# the deepest and the widest
QUICK_ARROWS = (0, 3)


def cases(setting: Setting) -> list[Case]:
    """The four arrows, forward alone and with all gradients."""
    return [
        _case(arrow, batch, dtype, backward, setting)
        for batch, size in setting.layer_shapes(quick_size=220)
        for dtype in setting.dtypes
        for backward in (False, True)
        for i, arrow in enumerate(a for a in arrows(size) if a.kind == "up")
        if i in QUICK_ARROWS or not setting.quick
    ]


def _case(arrow: Arrow, batch: int, dtype: torch.dtype, backward: bool, setting: Setting) -> Case:
    shapes = {
        "x": (batch, arrow.c_in, arrow.size, arrow.size),
        "weight": (arrow.c_in, arrow.c_out, 2, 2),
        "bias": (arrow.c_out,),
    }

    def inputs() -> Inputs:
        given = {
            name: noise(shape, setting.device, dtype, seed=seed)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        given["weight"] *= arrow.c_in**-0.5
        return given

    leaves = LEAVES if backward else ()
    given, y = sum(map(prod, shapes.values())), 4 * batch * arrow.c_out * arrow.size**2
    # backward, the gradient of y and all but the bias are read, and three gradients written
    elements = given + y + backward * (y + 2 * given - arrow.c_out)
    name = f"{batch} x {arrow.c_in} -> {arrow.c_out}, {arrow.size}x{arrow.size}"
    return Case(
        operator="up_conv",
        name=name + (", forward + backward" if backward else ", forward"),
        dtype=dtype,
        inputs=inputs,
        exact=exactly(ops.eager.up_conv, leaves),
        contenders=rivals(ops.eager.up_conv, ops.up_conv, leaves, setting),
        moved_bytes=elements * dtype.itemsize,
        flops=(3 if backward else 1) * batch * arrow.flops,
    )
