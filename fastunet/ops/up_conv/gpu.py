"""``up_conv`` on GPUs: forward in one pass with the bias; backward by the library."""

import torch
from torch import Tensor

from .._triton import gpu
from ..conv_relu.tiles import DESCRIPTOR_MAJORS
from ..conv_relu.triton_gradients import sum_of_pixels
from .reference import library_gradients, up_conv_reference
from .triton_kernels import up_convolve


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not take a call, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{x.dtype} is not float16 or bfloat16"
    if gpu(x.device).capability[0] not in DESCRIPTOR_MAJORS:
        return "the GPU has no tensor descriptors"
    if x.shape[1] % 8 or weight.shape[1] % 64:
        return "input channels must be a multiple of 8, output channels of 64"
    if x.numel() == 0:
        return "there are no pixels"
    for tensor in (x, weight):
        if not tensor.is_contiguous(memory_format=torch.channels_last) or tensor.data_ptr() % 16:
            return "x and weight must be in channels_last, from an address of 16 bytes on"
    return None


def up_conv_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``up_conv_reference``."""
    if unsupported(x, weight):
        return up_conv_reference(x, weight, bias)
    b, _, height, width = x.shape
    y = torch.empty(
        (b, weight.shape[1], 2 * height, 2 * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )

    up_convolve(x, weight, bias, y)
    return y


def up_conv_bwd_triton(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``up_conv_bwd_reference``."""
    need_x, need_weight, need_bias = needed
    if not need_bias or not grad.is_contiguous(memory_format=torch.channels_last):
        return library_gradients(grad, x, weight, needed)
    grad_x, grad_weight, _ = library_gradients(grad, x, weight, [need_x, need_weight, False])
    return grad_x, grad_weight, sum_of_pixels(grad)
