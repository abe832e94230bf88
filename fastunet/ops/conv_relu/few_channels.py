"""``conv_relu`` on the CPU of images of a few channels, by ``csrc/cpu/conv_few.cpp``.

All that a pixel reads is summed in registers, or in bfloat16 in one or two products of AMX's tiles,
where kernels for many channels leave most of theirs empty.
"""

import torch
from torch import Tensor

from ...backends import EXTENSION_MISSING
from .. import _amx
from .._library import LIBRARY

# of images as [B, H, W, C] and weights as [C_out, 3, 3, C]
LIBRARY.define("conv_few(Tensor x, Tensor weight, Tensor? bias, int padding, bool relu) -> Tensor")

# of images in float32; with more, oneDNN is faster
FEW_IN_FLOAT32 = 2
# output channels that are computed at once in float32
CHANNEL_GROUP = 8


def unsupported(x: Tensor, weight: Tensor, skip: Tensor | None) -> str | None:
    """Why the kernels do not take a convolution, or are not faster, or None."""
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if skip is not None:
        return "there is a skip"
    c_out, c_in = weight.shape[:2]
    if x.dtype == torch.bfloat16:
        return _amx.unsupported_few(x, weight)
    if c_in > FEW_IN_FLOAT32:
        return f"more than {FEW_IN_FLOAT32} channels"
    return None if c_out % CHANNEL_GROUP == 0 else f"no multiple of {CHANNEL_GROUP} outputs"


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, relu: bool) -> Tensor:
    """Convolution and bias, and ReLU if asked for."""
    pixels, taps = (t.permute(0, 2, 3, 1).contiguous() for t in (x, weight))
    y: Tensor = torch.ops.fastunet.conv_few(pixels, taps, bias, padding, relu)
    return y.permute(0, 3, 1, 2)
