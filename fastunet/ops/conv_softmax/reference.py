"""The 1x1 convolution that ends the network, and what its outputs say of the K classes.

    y[k, i, j] = bias[k] + sum over c of weight[k, c] x[c, i, j]
    p[k, i, j] = exp(y[k, i, j]) / sum over l of exp(y[l, i, j])
    label[i, j] = the first k of the largest y[k, i, j]

Kernels keep the outputs of 16-bit images in float32; here they are rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_softmax_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C, H, W] to probabilities [B, K, H, W], at least float32; softmax lays planes out."""
    y = F.conv2d(x, weight, bias)
    return y.softmax(1, dtype=torch.promote_types(y.dtype, torch.float32))


def conv_argmax_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C, H, W] to labels [B, H, W]."""
    return first_largest(F.conv2d(x, weight, bias))


def first_largest(y: Tensor) -> Tensor:
    """Of [B, K, H, W] the class of each pixel, in the smallest dtype; NaN is the largest number."""
    return y.argmax(1).to(torch.uint8 if y.shape[1] <= 256 else torch.int32)
