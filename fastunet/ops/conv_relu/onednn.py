"""``conv_relu`` on the CPU: PyTorch's oneDNN convolutions between native passes, or what is faster.

Float32 convolutions run by Winograd's algorithm where that is faster (``winograd_rule.py``),
bfloat16 ones on AMX, and those of a few channels by ``few_channels.py``. The rest is oneDNN's.

oneDNN could clamp in the convolution itself, but then turns NaN into 0; ``relu_pool_`` keeps it and
takes no longer than a max-pooling alone. It could also add the convolution of ``x`` to that of the
skip, but in bfloat16 the sum between is rounded, and signs near zero flip: forward concatenates.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _amx
from ..crop_concat.reference import centre_crop
from . import few_channels, winograd, winograd_rule
from .reference import (
    conv3x3_reference,
    conv_relu_bwd_reference,
    conv_relu_pool_reference,
    conv_relu_reference,
    convolution_gradients,
    is_channels_last,
    laid_out_like,
)

# weights that an input and an output channel share, for which products pay: the fewest at all, and
# for each pixel
FEWEST_PAIRS = {torch.float32: 1 << 19, torch.bfloat16: 1 << 16}
PAIRS_PER_PIXEL = 150
# for fewer channels oneDNN chooses slow kernels, unless weights are in its own order
FEW_CHANNELS = 8


def unsupported(x: Tensor, weight: Tensor, skip: Tensor | None) -> str | None:
    """Why oneDNN's own operators cannot take a call, or None."""
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this PyTorch has no oneDNN"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is not float32 or bfloat16"
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no fast bfloat16"
    if min(x.numel(), weight.numel()) == 0 or (skip is not None and skip.numel() == 0):
        return "there are no pixels or channels"
    if not is_channels_last(x, weight, skip):
        return "the images are not in channels_last"
    return None


def conv_relu_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
) -> Tensor:
    """As ``conv_relu_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_reference(x, weight, bias, padding, skip, *flags)
    return _forward(x, weight, bias, padding, skip, pool=False)[0]


def conv_relu_pool_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
) -> tuple[Tensor, Tensor]:
    """As ``conv_relu_pool_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_pool_reference(x, weight, bias, padding, skip, *flags)
    return _forward(x, weight, bias, padding, skip, pool=True)


def conv3x3_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None
) -> Tensor:
    """As ``conv3x3_reference``."""
    if unsupported(x, weight, skip):
        return conv3x3_reference(x, weight, bias, padding, skip)
    return _forward(x, weight, bias, padding, skip, pool=False, relu=False)[0]


def conv_relu_bwd_onednn(
    grad_y: Tensor,
    grad_pooled: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    needed: list[bool],
    relu_made_x: bool,
    grad_is_masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``conv_relu_bwd_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_bwd_reference(
            grad_y, grad_pooled, y, x, weight, skip, padding, needed, relu_made_x, grad_is_masked
        )
    masked = grad_y if grad_is_masked else _relu_pool_bwd(grad_y, grad_pooled, y)
    need_x, need_weight, need_bias, need_skip = needed
    grad_x = grad_weight = grad_bias = grad_skip = x.new_empty(0)
    call = (masked, x, weight, skip, padding)
    images = (need_x, need_skip)
    if any(images) and not winograd_rule.unsupported("images", x, weight, padding):
        grad_x, grad_skip = winograd.grad_images(*call, images, relu_made_x)
        need_x = need_skip = False
    if need_weight and not winograd_rule.unsupported("weights", x, weight, padding):
        grad_weight, grad_bias = winograd.grad_weight(*call, need_bias)
        need_weight = need_bias = False
    left = [need_x, need_weight, need_bias, need_skip]
    grads = (grad_x, grad_weight, grad_bias, grad_skip)
    if not any(left):
        return grads
    others = _all_gradients(*call, left, relu_made_x)
    grad_x, grad_weight, grad_bias, grad_skip = (
        b if need else a for a, b, need in zip(grads, others, left, strict=True)
    )
    return grad_x, grad_weight, grad_bias, grad_skip


def _all_gradients(
    masked: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    needed: list[bool],
    relu_made_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and skip by oneDNN, each source on its own."""
    need_x, need_weight, need_bias, need_skip = needed
    c = 0 if skip is None else skip.shape[1]
    of_skip = grad_skip = x.new_empty(0)
    crop = _cropped(skip, x)
    if crop is not None:
        # before that of x, as its crop and the whole together take the most memory of a step
        needed = [need_skip, need_weight, False]
        grad_skip, of_skip, _ = _gradients(masked, crop, weight[:, :c], padding, needed)
        if need_skip:
            grad_skip = torch.ops.fastunet.crop_concat_bwd(grad_skip, skip)
    needed = [need_x, need_weight, need_bias]
    mask = x if relu_made_x else None
    grad_x, grad_weight, grad_bias = _gradients(masked, x, weight[:, c:], padding, needed, mask)
    if crop is not None and need_weight:
        grad_weight = laid_out_like(torch.cat([of_skip, grad_weight], 1), weight)
    return grad_x, grad_weight, grad_bias, grad_skip


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    skip: Tensor | None,
    *,
    pool: bool,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """The output, clamped at zero unless without ``relu``, and its pooled copy, if asked for."""
    if not few_channels.unsupported(x, weight, skip):
        y = few_channels.conv_relu(x, weight, bias, padding, relu)
        return y, _relu_pool(y, pool) if pool else y
    if not _amx.unsupported(x, weight):
        return _amx.conv_relu(x, _cropped(skip, x), weight, bias, padding, pool, relu)
    if not winograd_rule.unsupported("forward", x, weight, padding):
        return winograd.conv_relu(x, weight, bias, padding, skip, pool, relu)
    y = _convolve(x, weight, bias, padding, skip)
    return y, _relu_pool(y, pool) if relu else y


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None
) -> Tensor:
    x = x if skip is None else torch.ops.fastunet.crop_concat(skip, x)
    x = x.contiguous(memory_format=torch.channels_last)
    if weight.shape[1] >= FEW_CHANNELS:
        return F.conv2d(x, weight, bias, padding=padding)
    options: list[Any] = [[padding, padding], [1, 1], [1, 1], 1]
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = reorder(weight.to_mkldnn(), *options, list(x.shape))
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *options, "none", [], "")


def _cropped(skip: Tensor | None, x: Tensor) -> Tensor | None:
    return None if skip is None else centre_crop(skip, x.shape[2], x.shape[3])


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: int,
    needed: list[bool],
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of the convolution; empty where not needed.

    That of x is zero where ``mask`` is given and not above zero.
    """
    need_x, need_weight, need_bias = needed
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    if need_x and not _amx.unsupported(grad, weight):
        grad_x, need_x = _amx.conv_grad(grad, weight, padding, mask), False
    if need_weight and not _amx.unsupported_grad_weight(x, weight):
        of_weight, of_bias = _amx.grad_weight(grad, x, padding)
        grad_weight, need_weight = laid_out_like(of_weight, weight), False
        if need_bias:
            grad_bias, need_bias = of_bias, False
    # the image itself needs no gradient
    few_channels = x.shape[1] < FEW_CHANNELS and not need_x and need_bias
    if need_weight and (few_channels or products_pay(x, weight, x.dtype)):
        gradient = _few_channels_grad_weight if few_channels else _products_grad_weight
        grad_weight, need_weight = laid_out_like(gradient(grad, x, weight, padding), weight), False
        if need_bias:
            grad_bias, need_bias = grad.sum((0, 2, 3)), False
    left = [need_x, need_weight, need_bias]
    if not any(left):
        return grad_x, grad_weight, grad_bias
    of_x, of_weight, of_bias = convolution_gradients(grad, x, weight, padding, left)
    if need_x:
        grad_x = laid_out_like(of_x, x)
        if mask is not None:
            grad_x = _relu_pool_bwd(grad_x, None, mask)
    if need_weight:
        grad_weight = laid_out_like(of_weight, weight)
    return grad_x, grad_weight, of_bias if need_bias else grad_bias


def products_pay(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether matrix products in ``dtype`` are faster than oneDNN's gradient of the weights."""
    pixels, pairs = x.shape[0] * x.shape[2] * x.shape[3], weight.shape[0] * weight.shape[1]
    return pairs >= max(FEWEST_PAIRS[dtype], PAIRS_PER_PIXEL * pixels)


def _products_grad_weight(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The gradient of ``weight``, a product [C_out, pixels] x [pixels, C] for each tap.

    All pixels of all images are one row of them. A tap is a distance in it, if the gradient is as
    wide and high as the images, with zeros where a tap would leave them.
    """
    pixels = F.pad(x.permute(0, 2, 3, 1), [0, 0, *[padding] * 4])  # [B, H, W, C]
    height, width = pixels.shape[1:3]
    margins = [0, width - grad.shape[3], 0, height - grad.shape[2]]
    rows = F.pad(grad.transpose(0, 1), margins).reshape(grad.shape[1], -1)
    pixels = pixels.reshape(-1, x.shape[1])
    taps = grad.new_empty((grad.shape[1], 3, 3, x.shape[1]))
    for i, j in product(range(3), repeat=2):
        away = i * width + j
        torch.mm(rows[:, : len(pixels) - away], pixels[away:], out=taps[:, i, j])
    return taps.permute(0, 3, 1, 2)


def _few_channels_grad_weight(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The gradient of ``weight`` where oneDNN's kernel for plain tensors is slow."""
    if x.dtype == torch.bfloat16:
        # the kernel for more channels, which in float32 is less accurate
        channels = [0, 0, 0, 0, 0, FEW_CHANNELS - x.shape[1]]
        x, wide = (
            F.pad(tensor, channels).contiguous(memory_format=torch.channels_last)
            for tensor in (x, weight)
        )
        needed = [False, True, False]
        return convolution_gradients(grad, x, wide, padding, needed)[1][:, : weight.shape[1]]
    # a matrix product a row, [taps, W] x [W, C_out], then their sum
    b, c_out, height, width = grad.shape
    windows = F.pad(x, [padding] * 4).unfold(2, 3, 1).unfold(3, 3, 1)  # [B, C, H, W, 3, 3]
    windows = windows.permute(0, 2, 1, 4, 5, 3).reshape(b * height, -1, width)
    rows = grad.permute(0, 2, 3, 1).reshape(b * height, width, c_out)
    return torch.bmm(windows, rows).sum(0).t().reshape(weight.shape)


def _relu_pool(y: Tensor, pool: bool) -> Tensor:
    """Clamp ``y`` at zero in place and return its max-pooled copy, if asked for."""
    pooled = torch.ops.fastunet.relu_pool_(y.permute(0, 2, 3, 1), pool)
    return pooled.permute(0, 3, 1, 2) if pool else pooled


def _relu_pool_bwd(grad_y: Tensor, grad_pooled: Tensor | None, y: Tensor) -> Tensor:
    """The gradient before the ReLU, in channels_last."""
    if grad_pooled is not None:
        grad_pooled = grad_pooled.permute(0, 2, 3, 1)
    grad = torch.ops.fastunet.relu_pool_bwd(
        grad_y.permute(0, 2, 3, 1), grad_pooled, y.permute(0, 2, 3, 1)
    )
    return grad.permute(0, 3, 1, 2)
