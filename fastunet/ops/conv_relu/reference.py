"""3x3 convolution, bias, ReLU and optional 2x2 max-pooling of a copied-and-cropped concatenation.

    y = max(0, W * [crop(skip), x] + b)        pooled[i, j] = max of y over the 2x2 block (i, j)

With m = [y > 0] the mask of the ReLU, read from the saved output itself, and g the gradient of y
(plus the gradient of pooled at each block's maximum):

    grad_[crop(skip), x] = W^T * (m g)    grad_W = (m g) * [crop(skip), x]    grad_b = sum(m g)

Convolution and its two transposes belong to PyTorch; what this file adds is their joining.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..crop_concat.reference import crop_concat_reference, uncrop


def conv_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None
) -> Tensor:
    """The convolution, bias and ReLU; [B, C_out, H', W'] with H' = H - 2 + 2 padding."""
    source = x if skip is None else crop_concat_reference(skip, x)
    return F.conv2d(source, weight, bias, padding=padding).relu_()


def conv_relu_pool_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same and its 2x2 max-pooled copy."""
    y = conv_relu_reference(x, weight, bias, padding, skip)
    return y, F.max_pool2d(y, 2)


def conv_relu_bwd_reference(
    grad_y: Tensor,
    grad_pooled: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and skip; one that is not ``needed`` comes back empty."""
    if grad_pooled is not None:
        _, indices = torch.ops.aten.max_pool2d_with_indices(y, [2, 2])
        grad_y = grad_y + torch.ops.aten.max_pool2d_with_indices_backward(
            grad_pooled, y, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
        )
    masked = torch.ops.aten.threshold_backward(grad_y, y, 0)
    need_x, need_weight, need_bias, need_skip = needed
    source = x if skip is None else crop_concat_reference(skip, x)
    grad_source, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        masked,
        source,
        weight,
        [weight.shape[0]],
        [1, 1],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [need_x or need_skip, need_weight, need_bias],
    )
    empty = x.new_empty(0)
    grad_x = grad_skip = empty
    if skip is None:
        grad_x = grad_source if need_x else empty
    elif need_x or need_skip:
        c = skip.shape[1]
        grad_x = grad_source[:, c:].contiguous(memory_format=_format_of(grad_source))
        grad_skip = uncrop(grad_source[:, :c], skip)
    return (
        grad_x,
        grad_weight if need_weight else empty,
        grad_bias if need_bias else empty,
        grad_skip,
    )


def _format_of(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
