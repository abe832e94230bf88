"""2x2 transposed convolution of stride 2: each pixel of x becomes four of y.

    y[o, 2i + di, 2j + dj] = b[o] + sum_c W[c, o, di, dj] x[c, i, j]        [then max(0, y)]

a product of matrices, pixels x C by C x 4 C_out, of which no two terms meet in one pixel of y. With
g the gradient of y, zero where a ReLU was shut:

    grad_x = W g (a 2x2 convolution of stride 2)    grad_W = x g^T    grad_b = sum(g)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def up_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """[B, C_out, 2 H, 2 W], in channels_last where ``x`` or ``weight`` is."""
    y = F.conv_transpose2d(x, weight, bias, stride=2)
    layout = torch.channels_last if is_channels_last(x, weight) else torch.contiguous_format
    # PyTorch's own layout is this one but for images of one pixel, and without values
    y = y.contiguous(memory_format=layout)
    return y.relu_() if relu else y


def is_channels_last(*tensors: Tensor) -> bool:
    """Whether one of ``tensors`` is in channels_last and in no other layout."""
    return any(
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in tensors
    )


def up_conv_bwd_reference(
    grad_y: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; one that is not ``needed`` comes back empty.

    ``y`` is given where a ReLU made it.
    """
    if y is not None:
        grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
    grads = torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.shape[1]], [2, 2], [0, 0], [1, 1], True, [0, 0], 1, needed
    )
    empty = x.new_empty(0)
    grad_x, grad_weight, grad_bias = (
        got if need else empty for got, need in zip(grads, needed, strict=True)
    )
    return grad_x, grad_weight, grad_bias
