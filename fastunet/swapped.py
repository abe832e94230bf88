"""What runs in place of other people's modules, and which of them it can stand in for."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import EXTENSION_MISSING
from .ops import conv_norm_relu, up_conv
from .ops.folding import by_statistics, normalised
from .tracing import has_hooks

NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
# what may stand between a convolution and its ReLU
BETWEEN = (*NORMS, nn.Dropout, nn.Dropout2d, nn.Identity)
_ONCE = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
_UP = {"stride": (2, 2), "padding": (0, 0), "output_padding": (0, 0), "dilation": (1, 1)}

# the module of an activation, or the slope below zero of one that is a function, 1 for none
Activation = nn.Module | float


def why_not(module: nn.Module) -> str | None:
    """Why no operator of ours can stand in for a convolution, whatever follows it, or None."""
    is_up = isinstance(module, nn.ConvTranspose2d)
    plain = nn.ConvTranspose2d if is_up else nn.Conv2d
    if type(module) is not plain:
        return f"a {type(module).__name__} is not a plain {plain.__name__}"
    size = (2, 2) if is_up else (3, 3)
    for name, want in ({"kernel_size": size} | _ONCE | (_UP if is_up else {})).items():
        if getattr(module, name) != want:
            return f"{name} {getattr(module, name)}"
    if not is_up and module.padding not in ((0, 0), (1, 1), "same", "valid"):
        return f"padding {module.padding}"
    if module.padding_mode != "zeros" and module.padding not in ((0, 0), "valid"):
        return f"padding mode {module.padding_mode}"
    return "it has hooks" if has_hooks(module) else None


def slope_of(activation: Activation | None) -> float | None:
    """The slope below zero of ReLU or LeakyReLU, or None if it is another activation."""
    if isinstance(activation, nn.Module) and not has_hooks(activation):
        if type(activation) is nn.ReLU:
            return 0.0
        if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0:
            return float(activation.negative_slope)
    return activation if isinstance(activation, float) else None


def on_cpu(*images: Any) -> bool:
    """Whether ``images`` are where normalisation and convolutions alone have kernels of ours."""
    return not EXTENSION_MISSING and all(
        image.device.type == "cpu" and image.dtype in (torch.float32, torch.bfloat16)
        for image in images
        if isinstance(image, Tensor)
    )


def drops(module: nn.Module) -> bool:
    """Whether ``module`` does something in training that no operator of ours does."""
    return isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.p > 0


def why_not_everywhere(between: list[nn.Module], slope: float | None) -> str:
    """Why a convolution with these behind it is not ``conv_relu``, which GPUs have too."""
    for module in between:
        if isinstance(module, nn.InstanceNorm2d):
            return "followed by InstanceNorm2d, not ReLU"
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
            return "its BatchNorm2d has no running statistics"
    return "" if slope == 0 else "followed by LeakyReLU, not ReLU"


def run(
    x: Tensor,
    skip: Tensor | None,
    conv: nn.Conv2d,
    between: tuple[nn.Module, ...],
    activation: Activation,
    pool: nn.MaxPool2d | None,
    pooled: bool,
) -> Any:
    """What the modules compute one after the other, by ``conv_norm_relu`` where it can.

    Args:
        x: [B, C, H, W], input of ``conv``, or the second part of it.
        skip: [B, C_skip, H, W], the first part, or None.
        conv: the convolution.
        between: what stands between ``conv`` and the activation.
        activation: what follows.
        pool: the module of the max-pooling, or None for a function or none.
        pooled: whether there is a max-pooling.
    Returns: [B, C_out, H', W'], or with ``pooled`` a pair of that and its pooled copy.
    """
    norms: list[Any] = [module for module in between if isinstance(module, NORMS)]
    slope = slope_of(activation)
    serves = (
        x.ndim == 4
        and (skip is None or skip.shape[2:] == x.shape[2:])
        and not why_not(conv)
        and (pool is None or is_pool(pool))
        and len(norms) <= 1
        and all(type(each) in BETWEEN and not has_hooks(each) for each in between)
        and not any(each.training and drops(each) for each in between)
        and (on_cpu(x) or not why_not_everywhere(norms, slope))
    )
    if slope is not None and serves:
        x, norm = x.contiguous(memory_format=torch.channels_last), norms[0] if norms else None
        return conv_norm_relu(x, conv, norm, negative_slope=slope, skip=skip, pool=pooled)
    y = conv(x if skip is None else torch.cat([skip, x], 1))
    for module in between:
        y = module(y)
    y = _activated(y, activation)
    if not pooled:
        return y
    return y, (F.max_pool2d(y, 2) if pool is None else pool(y))


def run_norm(x: Tensor, norm: nn.Module, activation: Activation) -> Tensor:
    """What the two compute one after the other, by one pass over [B, C, H, W] where there is."""
    slope, has_kernels = slope_of(activation), x.ndim == 4 and on_cpu(x)
    if isinstance(norm, NORMS) and not has_hooks(norm) and slope is not None and has_kernels:
        if by_statistics(norm):
            x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor = normalised(x, norm, slope, pool=False)
        return y
    return _activated(norm(x), activation)


def run_up(x: Tensor, up: nn.ConvTranspose2d) -> Tensor:
    """What ``up`` computes, by ``up_conv`` where it can: [B, C, H, W] to [B, C_out, 2 H, 2 W]."""
    if why_not(up) or x.ndim != 4:
        return up(x)
    return up_conv(x.contiguous(memory_format=torch.channels_last), up.weight, up.bias)


def is_pool(module: nn.Module) -> bool:
    """Whether it is the max-pooling of the figure."""
    return (
        type(module) is nn.MaxPool2d
        and module.kernel_size in (2, (2, 2))
        and module.stride in (2, (2, 2))
        and module.padding in (0, (0, 0))
        and module.dilation in (1, (1, 1))
        and not module.ceil_mode
        and not module.return_indices
        and not has_hooks(module)
    )


def _activated(y: Tensor, activation: Activation) -> Tensor:
    if isinstance(activation, nn.Module):
        return activation(y)
    if activation == 1:
        return y
    return F.leaky_relu(y, activation) if activation else F.relu(y)
