"""The operators of a network in plain PyTorch: the twin that ours are tested and timed against.

Same names and arguments as in ``fastunet.ops``, differentiated by PyTorch itself:
``UNet(ops=fastunet.ops.eager)`` is the same network without anything of ours.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .conv_softmax.reference import conv_argmax_reference, conv_softmax_reference
from .crop_concat.reference import crop_concat_reference as crop_concat
from .up_conv.reference import up_conv_reference


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """As ``fastunet.ops.conv_relu``, by concatenation, convolution, ReLU and max-pooling."""
    source = x if skip is None else crop_concat(skip, x)
    y = F.relu(F.conv2d(source, weight, bias, padding=padding))
    return (y, F.max_pool2d(y, 2)) if pool else y


def conv_relu_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    padding: int = 0,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """As ``fastunet.ops.conv_relu_pair``, one after the other."""
    between = conv_relu(x, weight1, bias1, padding=padding, skip=skip)
    return conv_relu(between, weight2, bias2, padding=padding, pool=pool)


def conv_norm_relu(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module | None,
    *,
    negative_slope: float = 0.0,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """As ``fastunet.ops.conv_norm_relu``, one after the other."""
    source = x if skip is None else crop_concat(skip, x)
    y = F.conv2d(source, conv.weight, conv.bias, padding=conv.padding)
    y = y if norm is None else norm(y)
    y = F.leaky_relu(y, negative_slope, inplace=True) if negative_slope else F.relu(y, inplace=True)
    return (y, F.max_pool2d(y, 2)) if pool else y


def up_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``fastunet.ops.up_conv``, by ``torch.nn.functional.conv_transpose2d``."""
    return up_conv_reference(x, weight, bias)


def conv_softmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``fastunet.ops.conv_softmax``, one after the other."""
    return conv_softmax_reference(x, weight, bias)


def conv_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``fastunet.ops.conv_argmax``, one after the other."""
    return conv_argmax_reference(x, weight, bias)


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """As ``fastunet.ops.weighted_cross_entropy``, by ``torch.nn.functional.cross_entropy``."""
    if class_weight is None:
        class_weight = logits.new_ones(logits.shape[1])
    loss = F.cross_entropy(
        logits,
        target.long(),
        class_weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if pixel_weight is not None:
        loss = loss * pixel_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counts = target != ignore_index
    share = class_weight[target.long() * counts] * counts
    if pixel_weight is not None and reduction == "weighted_mean":
        share = share * pixel_weight
    return loss.sum() / share.sum()


__all__ = [
    "conv_argmax",
    "conv_norm_relu",
    "conv_relu",
    "conv_relu_pair",
    "conv_softmax",
    "crop_concat",
    "up_conv",
    "weighted_cross_entropy",
]
