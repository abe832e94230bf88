"""Normalisation between convolution and ReLU.

By running statistics it is a factor and a shift per channel, which are part of the convolution:

    s = gamma / sqrt(var + eps)    W' = s W    b' = s (b - mean) + beta

By those of the batch or of each image, ReLU is part of it (``norm_relu``).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_relu import conv3x3, conv_relu
from .conv_relu.onednn import products_pay
from .crop_concat import crop_concat
from .norm_relu import Norm, norm_relu, unsupported

# of a convolution's output: gradients of fewer take less time than Python takes to ask for them
FEW_ELEMENTS = 1 << 17


def folded(conv: nn.Conv2d, norm: Norm) -> tuple[Tensor, Tensor]:
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


def convolving_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution alone is faster by ``conv3x3``: on the CPU, if it is not tiny."""
    if x.device.type != "cpu":
        return False
    if not torch.is_grad_enabled():
        return True
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
    many = x.shape[0] * x.shape[2] * x.shape[3] * weight.shape[0] >= FEW_ELEMENTS
    return many or (dtype == torch.bfloat16 and products_pay(x, weight, dtype))


def conv_norm_relu(
    x: Tensor,
    conv: nn.Conv2d,
    norm: Norm | None,
    *,
    negative_slope: float = 0.0,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """``conv_relu`` with normalisation between convolution and ReLU, or a leaky one.

        leaky_relu(norm(conv(cat([centre_crop(skip), x], 1))), negative_slope)

    Args:
        x: [B, C, H, W] as of ``conv_relu``.
        conv: 3x3, with padding 0 or 1.
        norm: in training a batch normalisation is by the batch, and its running statistics follow;
            None for none.
        negative_slope: 0 for ReLU, 1 for none.
        skip: as of ``conv_relu``.
        pool: as of ``conv_relu``.
    Returns: as of ``conv_relu``.
    Raises: as ``conv_relu``.
    """
    weight, bias, padding = conv.weight, conv.bias, padding_of(conv)
    if norm is not None and not by_statistics(norm) and folding_pays(x, conv):
        weight, bias = folded(conv, norm)
        norm = None
    if norm is None and negative_slope == 0:
        return conv_relu(x, weight, bias, padding=padding, skip=skip, pool=pool)
    if convolving_pays(x, weight):
        y = conv3x3(x, weight, bias, padding=padding, skip=skip)
    else:
        y = F.conv2d(x if skip is None else crop_concat(skip, x), weight, bias, padding=padding)
    return normalised(y, norm, negative_slope, pool)


def normalised(y: Tensor, norm: Norm | None, negative_slope: float, pool: bool) -> Any:
    """``leaky_relu(norm(y), negative_slope)``, and its pooled copy on request; may change ``y``."""
    fused_pool = pool and negative_slope == 0
    if norm is not None and by_statistics(norm) and not unsupported(y, norm):
        y = norm_relu(y, norm, negative_slope=negative_slope, pool=fused_pool)
        if fused_pool:
            return y
    else:
        y = y if norm is None else norm(y)
        if negative_slope == 0:
            y = F.relu(y, inplace=True)
        elif negative_slope != 1:
            # in place its gradient would need the result, which a caller may change
            y = F.leaky_relu(y, negative_slope, inplace=not torch.is_grad_enabled())
    return (y, F.max_pool2d(y, 2)) if pool else y


def by_statistics(norm: Norm) -> bool:
    """Whether ``norm`` goes by what it is given, not by what it has seen."""
    return norm.training or norm.running_mean is None


def padding_of(conv: nn.Conv2d) -> int:
    """0 or 1, of a 3x3 convolution that says it in any way."""
    return int(conv.padding in ((1, 1), "same"))
