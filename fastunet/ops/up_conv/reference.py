"""The 2x2 up-convolution: a transposed convolution of stride 2, whose taps do not overlap.

    y[o, 2 i + di, 2 j + dj] = bias[o] + sum over c of x[c, i, j] weight[c, o, di, dj]

so that each pixel makes four, by a product with a matrix of [C, 4 C_out].
"""

import torch.nn.functional as F
from torch import Tensor

from ..conv_relu.reference import convolution_gradients, laid_out_like


def up_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C, H, W] to [B, C_out, 2 H, 2 W] by PyTorch's transposed convolution."""
    return F.conv_transpose2d(x, weight, bias, stride=2)


def up_conv_bwd_reference(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of the output; empty where not needed."""
    return library_gradients(grad, x, weight, needed)


# benchmarks take a call of the function above for a fallback, so that others call this one
def library_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Those that PyTorch computes."""
    grad_x, grad_weight, grad_bias = convolution_gradients(
        grad, x, weight, 0, needed, stride=2, transposed=True
    )
    return (
        laid_out_like(grad_x, x) if needed[0] else grad_x,
        laid_out_like(grad_weight, weight) if needed[1] else grad_weight,
        grad_bias,
    )
