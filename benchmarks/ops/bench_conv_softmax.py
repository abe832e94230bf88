"""conv_softmax and conv_argmax: the last arrow of figure 1, as a prediction needs it."""

import torch

from fastunet import ops

from ..cases import Case, Inputs, Setting, exactly, rivals
from ..figure import Arrow, arrows
from .bench_conv_relu import noisy_layer

CLASSES = (2, 21)
FUNCTIONS = {
    "probabilities": (ops.eager.conv_softmax, ops.conv_softmax),
    "labels": (ops.eager.conv_argmax, ops.conv_argmax),
}
# of all numbers: float32 sums their products without rounding, which could decide on a label
GRAIN = 2.0**-4


def cases(setting: Setting) -> list[Case]:
    """Figure 1's two classes and more, to probabilities and to labels."""
    return [
        _case(tuple(arrows(size, n_classes=classes))[-1], batch, dtype, result, setting)
        for batch, size in setting.layer_shapes(quick_size=380)
        for dtype in setting.dtypes
        for classes in (CLASSES[:1] if setting.quick else CLASSES)
        for result in FUNCTIONS
    ]


def _case(arrow: Arrow, batch: int, dtype: torch.dtype, result: str, setting: Setting) -> Case:
    shapes = {
        "x": (batch, arrow.c_in, arrow.size, arrow.size),
        "weight": (arrow.c_out, arrow.c_in, 1, 1),
        "bias": (arrow.c_out,),
    }
    eager, ours = FUNCTIONS[result]

    def inputs() -> Inputs:
        given = noisy_layer(shapes, setting.device, dtype)
        return {name: (tensor / GRAIN).round() * GRAIN for name, tensor in given.items()}

    # images are read in dtype; a label is a byte, a probability float32
    pixel_bytes = arrow.c_in * dtype.itemsize + (1 if result == "labels" else 4 * arrow.c_out)
    return Case(
        operator="conv_softmax",
        name=f"{batch} x {arrow.c_in} -> {arrow.c_out}, {arrow.size}x{arrow.size} to {result}, "
        "forward",
        dtype=dtype,
        inputs=inputs,
        exact=exactly(eager),
        contenders=rivals(eager, ours, (), setting),
        moved_bytes=batch * arrow.size**2 * pixel_bytes,
        flops=batch * arrow.flops,
    )
