"""``up_conv`` on the CPU: oneDNN's transposed convolution, and gradients by matrix products.

The products take 0.3 to 0.8 of the time of oneDNN's gradients. Forward, oneDNN writes the four
pixels of each where they belong; products that are then put in order take as long or longer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_relu.reference import laid_out_like
from .reference import library_gradients

# in float32, where weights in another order cost less, oneDNN is faster for fewer
FEWEST_CHANNELS = 16
FEWEST_VALUES = 1 << 14


def up_conv_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``up_conv_reference``."""
    return F.conv_transpose2d(x, weight, bias, stride=2)


def up_conv_bwd_onednn(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``up_conv_bwd_reference``."""
    if not _pays(x):
        return library_gradients(grad, x, weight, needed)
    need_x, need_weight, need_bias = needed
    (batch, c, height, width), c_out = x.shape, weight.shape[1]
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    # four pixels and their channels a row, in the order of the taps
    fours = grad.permute(0, 2, 3, 1).reshape(batch, height, 2, width, 2, c_out)
    fours = fours.transpose(2, 3).reshape(batch * height * width, 4 * c_out)
    if need_x:
        taps = weight.permute(0, 2, 3, 1).reshape(c, 4 * c_out)
        images = torch.mm(fours, taps.t()).view(batch, height, width, c)
        grad_x = laid_out_like(images.permute(0, 3, 1, 2), x)
    if need_weight:
        pixels = x.permute(0, 2, 3, 1).reshape(-1, c)
        of_taps = torch.mm(pixels.t(), fours).view(c, 2, 2, c_out)
        grad_weight = laid_out_like(of_taps.permute(0, 3, 1, 2), weight)
    if need_bias:
        # sums in float32 by itself; asked for them, PyTorch first copies the images into float32
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias


def _pays(x: Tensor) -> bool:
    """Whether products are faster than oneDNN's gradients, for dtypes that have both."""
    if x.dtype == torch.bfloat16:
        return True
    wide = x.shape[1] >= FEWEST_CHANNELS and x.numel() >= FEWEST_VALUES
    return wide and x.dtype in (torch.float32, torch.float64)
