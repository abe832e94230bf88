"""Batch normalisation in evaluation is a factor and a shift per channel: part of the convolution.

s = gamma / sqrt(var + eps)    W' = s W    b' = s (b - mean) + beta
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import eager
from .conv_relu import conv_relu


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


def conv_norm_relu(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    *,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """``conv_relu`` with batch normalisation between convolution and ReLU, by running statistics.

        relu(norm(conv(cat([centre_crop(skip), x], 1))))

    Args:
        x: [B, C, H, W] as of ``conv_relu``.
        conv: 3x3, with padding 0 or 1.
        norm: has running statistics, which are not changed.
        skip: as of ``conv_relu``.
        pool: as of ``conv_relu``.
    Returns: as of ``conv_relu``.
    Raises: as ``conv_relu``.
    """
    if not folding_pays(x, conv):
        return eager.conv_norm_relu(x, conv, norm, skip=skip, pool=pool)
    weight, bias = folded(conv, norm)
    return conv_relu(x, weight, bias, padding=int(conv.padding[0]), skip=skip, pool=pool)
