"""Batch normalisation between convolution and ReLU.

In evaluation it is a factor and a shift per channel, which are part of the convolution:

    s = gamma / sqrt(var + eps)    W' = s W    b' = s (b - mean) + beta

In training it is by the batch's own statistics, and ReLU is part of it (``norm_relu``).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_relu import conv3x3, conv_relu
from .conv_relu.onednn import products_pay
from .crop_concat import crop_concat
from .norm_relu import norm_relu, unsupported

# of a convolution's output: gradients of fewer take less time than Python takes to ask for them
FEW_ELEMENTS = 1 << 17


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weights and bias of the convolution that equals ``norm(conv(x))`` in eval mode.

    Computed at each call: nothing can be stale after a step of an optimiser or a load.
    """
    mean, var, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + norm.eps)
    if gamma is not None:
        scale = scale * gamma
    bias = -mean * scale if conv.bias is None else (conv.bias - mean) * scale
    if beta is not None:
        bias = bias + beta
    weight = conv.weight * scale[:, None, None, None]
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def folding_pays(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether folding takes less than normalising: 9 C_in C_out numbers, or B H W C_out."""
    return x.shape[0] * x.shape[2] * x.shape[3] >= 9 * conv.in_channels


def convolving_pays(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a convolution alone is faster by ``conv3x3``: on the CPU, if it is not tiny."""
    if x.device.type != "cpu":
        return False
    if not torch.is_grad_enabled():
        return True
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
    many = x.shape[0] * x.shape[2] * x.shape[3] * conv.out_channels >= FEW_ELEMENTS
    return many or (dtype == torch.bfloat16 and products_pay(x, conv.weight, dtype))


def conv_norm_relu(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    *,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """``conv_relu`` with batch normalisation between convolution and ReLU.

        relu(norm(conv(cat([centre_crop(skip), x], 1))))

    Args:
        x: [B, C, H, W] as of ``conv_relu``.
        conv: 3x3, with padding 0 or 1.
        norm: in training it normalises by the batch, and its running statistics follow.
        skip: as of ``conv_relu``.
        pool: as of ``conv_relu``.
    Returns: as of ``conv_relu``.
    Raises: as ``conv_relu``.
    """
    padding, by_batch = padding_of(conv), norm.training or norm.running_mean is None
    if not by_batch and folding_pays(x, conv):
        weight, bias = folded(conv, norm)
        return conv_relu(x, weight, bias, padding=padding, skip=skip, pool=pool)
    if convolving_pays(x, conv):
        y = conv3x3(x, conv.weight, conv.bias, padding=padding, skip=skip)
    else:
        source = x if skip is None else crop_concat(skip, x)
        y = F.conv2d(source, conv.weight, conv.bias, padding=padding)
    if by_batch and not unsupported(y, norm):
        return norm_relu(y, norm, pool=pool)
    y = F.relu(norm(y), inplace=True)
    return (y, F.max_pool2d(y, 2)) if pool else y


def padding_of(conv: nn.Conv2d) -> int:
    """0 or 1, of a 3x3 convolution that says it in any way."""
    return int(conv.padding in ((1, 1), "same"))
