"""up_conv: the green arrows of figure 1."""

import torch

from fastunet import ops

from ..cases import Case, Setting, exactly, rivals
from ..figure import Arrow, arrows
from .bench_conv_relu import noisy_layer

LEAVES = ("x", "weight", "bias")
# the last and widest
QUICK_ARROWS = (3,)


def cases(setting: Setting) -> list[Case]:
    """The four arrows with all gradients: forward it is PyTorch's own."""
    return [
        _case(arrow, batch, dtype, setting)
        for batch, size in setting.layer_shapes(quick_size=380)
        for dtype in setting.dtypes
        for i, arrow in enumerate(a for a in arrows(size) if a.kind == "up")
        if i in QUICK_ARROWS or not setting.quick
    ]


def _case(arrow: Arrow, batch: int, dtype: torch.dtype, setting: Setting) -> Case:
    shapes = {
        "x": (batch, arrow.c_in, arrow.size, arrow.size),
        "weight": (arrow.c_in, arrow.c_out, 2, 2),
        "bias": (arrow.c_out,),
    }
    return Case(
        operator="up_conv",
        name=f"{batch} x {arrow.channels} -> {arrow.c_out}, {arrow.size}x{arrow.size}, "
        "forward + backward",
        dtype=dtype,
        inputs=lambda: noisy_layer(shapes, setting.device, dtype),
        exact=exactly(ops.eager.up_conv, LEAVES),
        contenders=rivals(ops.eager.up_conv, ops.up_conv, LEAVES, setting),
        flops=3 * batch * arrow.flops,
    )
