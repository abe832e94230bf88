"""conv_norm_relu: the blue arrows of figure 1 with batch normalisation between, in training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastunet import ops

from ..cases import Case, Setting, exactly, rivals
from ..figure import Arrow, arrows
from .bench_conv_relu import noisy_layer

# the largest and one of the middle
QUICK_ARROWS = (1, 5)


def cases(setting: Setting) -> list[Case]:
    """The convolutions of the paper's network with all gradients."""
    return [
        _case(arrow, batch, dtype, setting)
        for batch, size in setting.layer_shapes(quick_size=220)
        for dtype in setting.dtypes
        for i, arrow in enumerate(a for a in arrows(size) if a.kind == "conv")
        if i in QUICK_ARROWS or not setting.quick
    ]


class _Layer(nn.Module):
    """Convolution, batch normalisation and ReLU, whose weights are given in each call."""

    def __init__(self, arrow: Arrow, operator: Callable[..., Any]) -> None:
        super().__init__()
        with torch.device("meta"):
            self.conv = nn.Conv2d(arrow.c_skip + arrow.c_in, arrow.c_out, 3, bias=False)
            self.norm = nn.BatchNorm2d(arrow.c_out, track_running_stats=False)
        self.operator = partial(operator, pool=arrow.pool)

    def forward(self, x: Tensor, skip: Tensor | None) -> Any:
        return self.operator(x, self.conv, self.norm, skip=skip)


def _case(arrow: Arrow, batch: int, dtype: torch.dtype, setting: Setting) -> Case:
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, arrow.c_in, arrow.size, arrow.size),
        "weight": (arrow.c_out, arrow.c_skip + arrow.c_in, 3, 3),
        "gamma": (arrow.c_out,),
        "beta": (arrow.c_out,),
    }
    if arrow.c_skip:
        shapes["skip"] = (batch, arrow.c_skip, arrow.skip_size, arrow.skip_size)
    # the image itself needs no gradient
    leaves = [name for name in shapes if name != "x" or arrow.c_in > 1]

    def function(operator: Callable[..., Any]) -> Callable[..., Any]:
        layer = _Layer(arrow, operator)

        def call(
            x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, skip: Tensor | None = None
        ) -> Any:
            weights = {"conv.weight": weight, "norm.weight": gamma, "norm.bias": beta}
            return functional_call(layer, weights, (x, skip))

        return call

    eager, ours = (function(module.conv_norm_relu) for module in (ops.eager, ops))
    pool = " + pool" if arrow.pool else ""
    return Case(
        operator="conv_norm_relu",
        name=f"{batch} x {arrow.channels} -> {arrow.c_out}, {arrow.size}x{arrow.size}{pool}, "
        "forward + backward",
        dtype=dtype,
        inputs=lambda: noisy_layer(shapes, setting.device, dtype),
        exact=exactly(eager, leaves),
        contenders=rivals(eager, ours, leaves, setting),
        flops=(2 + ("x" in leaves)) * batch * arrow.flops,
    )
