"""``conv_softmax`` and ``conv_argmax`` on GPUs, in one pass over the pixels."""

import torch
from torch import Tensor

from .reference import conv_argmax_reference, conv_softmax_reference
from .triton_kernels import MOST_CLASSES, classify


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernel does not take a call, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{x.dtype} is not float16, bfloat16 or float32"
    if len(weight) > MOST_CLASSES:
        return f"a program holds {MOST_CLASSES} classes, got {len(weight)}"
    if x.numel() == 0:
        return "there are no pixels"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not in channels_last"
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return "weight and bias are not contiguous"
    return None


def conv_softmax_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``conv_softmax_reference``."""
    if unsupported(x, weight, bias):
        return conv_softmax_reference(x, weight, bias)
    y = x.new_empty((len(x), len(weight), *x.shape[2:]), dtype=torch.float32)
    classify(x, weight, bias, y)
    return y


def conv_argmax_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``conv_argmax_reference``."""
    if unsupported(x, weight, bias):
        return conv_argmax_reference(x, weight, bias)
    labels = x.new_empty((len(x), *x.shape[2:]), dtype=torch.uint8)
    classify(x, weight, bias, labels)
    return labels
