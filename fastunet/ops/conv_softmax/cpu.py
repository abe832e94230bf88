"""``conv_softmax`` and ``conv_argmax`` on the CPU, in one pass over the pixels."""

import torch
from torch import Tensor

from .._library import LIBRARY
from .reference import conv_argmax_reference, conv_softmax_reference

# of images as [B, H, W, C]
LIBRARY.define("conv_softmax_pixels(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define("conv_argmax_pixels(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

# a label is a byte, and the matrix product of more is what takes time
MOST_CLASSES = 256


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not take a call, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is not float32 or bfloat16"
    if len(weight) > MOST_CLASSES:
        return f"more than {MOST_CLASSES} classes"
    if x.numel() == 0:
        return "there are no pixels"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not in channels_last"
    return None


def conv_softmax_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``conv_softmax_reference``."""
    if unsupported(x, weight):
        return conv_softmax_reference(x, weight, bias)
    return torch.ops.fastunet.conv_softmax_pixels(x.permute(0, 2, 3, 1), weight, bias)


def conv_argmax_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``conv_argmax_reference``."""
    if unsupported(x, weight):
        return conv_argmax_reference(x, weight, bias)
    return torch.ops.fastunet.conv_argmax_pixels(x.permute(0, 2, 3, 1), weight, bias)
