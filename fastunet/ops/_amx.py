"""Convolutions in bfloat16 on the matrix tiles of AMX, by ``csrc/cpu/conv_amx.cpp``.

    pixels [16, 32] x weights [32, 16] a tile product, summed over taps and channels in float32

Weights are arranged anew in each call, which costs a few per cent: nothing derived from them is
kept, so nothing can be stale.
"""

from functools import cache

import torch
from torch import Tensor

from ._library import LIBRARY

# images come and go as [B, C, H, W] in channels_last, results of the operators as [B, H, W, C]
LIBRARY.define("has_amx() -> bool")
LIBRARY.define(
    "conv_relu_amx(Tensor x, Tensor? skip, Tensor weight, Tensor? bias, int padding, bool pool, "
    "bool relu=True) -> (Tensor, Tensor)"
)
LIBRARY.define("conv_grad_amx(Tensor grad, Tensor weight, int padding, Tensor? mask) -> Tensor")
LIBRARY.define("grad_weight_amx(Tensor grad, Tensor x, int padding) -> (Tensor, Tensor)")

# with fewer input channels most of a tile is empty
FEW_CHANNELS = 8
# where inputs and outputs are no more, half of it is, and oneDNN is faster
NARROW = 16


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why AMX cannot take a convolution of ``x``, or is slower, or None."""
    if x.shape[1] < FEW_CHANNELS:
        return f"fewer than {FEW_CHANNELS} channels"
    if max(weight.shape[:2]) <= NARROW:
        return f"no more than {NARROW} channels"
    return _unsupported(x, weight)


def unsupported_grad_weight(x: Tensor, weight: Tensor) -> str | None:
    """Why AMX cannot take the gradient of ``weight``, or is slower, or None."""
    if x.shape[1] >= FEW_CHANNELS and max(weight.shape[:2]) <= NARROW:
        return f"no more than {NARROW} channels"
    return _unsupported(x, weight)


def unsupported_few(x: Tensor, weight: Tensor) -> str | None:
    """Why AMX cannot take a convolution of few channels, or None."""
    if x.shape[1] >= FEW_CHANNELS:
        return f"{FEW_CHANNELS} channels or more"
    return _unsupported(x, weight)


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if min(x.numel(), weight.numel()) == 0:
        return "there are no pixels or channels"
    return why_not_here()


@cache
def why_not_here() -> str | None:
    """Why this machine has none of it, or None."""
    try:
        return None if torch.ops.fastunet.has_amx() else "this processor has no AMX"
    except NotImplementedError:
        return "the native extension is not built"


def conv_relu(
    x: Tensor,
    crop: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    pool: bool,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Convolution, bias, ReLU and pooled copy, as asked for; ``crop`` is as large as x."""
    x, weight = _channels_last(x), _channels_last(weight)
    crop = None if crop is None else _channels_last(crop)
    bias = None if bias is None else bias.contiguous()
    y, pooled = torch.ops.fastunet.conv_relu_amx(x, crop, weight, bias, padding, pool, relu)
    return _images(y), _images(pooled) if pool else pooled


def conv_grad(grad: Tensor, weight: Tensor, padding: int, mask: Tensor | None) -> Tensor:
    """The gradient of a convolution's input, zero where ``mask`` is given and not above zero."""
    mask = None if mask is None else mask.permute(0, 2, 3, 1).contiguous()
    grad, weight = _channels_last(grad), _channels_last(weight)
    return _images(torch.ops.fastunet.conv_grad_amx(grad, weight, padding, mask))


def grad_weight(grad: Tensor, x: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution's weights, in channels_last, and of its bias.

    Where a pixel is not finite all nine taps are NaN.
    """
    grad, x = _channels_last(grad), _channels_last(x)
    weight, bias = torch.ops.fastunet.grad_weight_amx(grad, x, padding)
    return _images(weight), bias


def _channels_last(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy, with its channels next to each other."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous(memory_format=torch.channels_last)


def _images(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)
