"""``conv_relu`` on the CPU in float32 by Winograd's F(4x4, 3x3), where it is faster than oneDNN.

    y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A

for each tile of 4x4 outputs, with d the 6x6 inputs that it depends on and g the 3x3 weights: 36
products a channel and tile instead of 144. docs/maths/winograd.md derives the matrices, the
gradients, which are the same sums, and the error; ``winograd_rule.py`` is where it serves.

Weights are transformed in each call: nothing derived from them is kept, so nothing can be stale.
"""

import torch
from torch import Tensor

from .._library import LIBRARY
from .reference import laid_out_like

# images come and go as [B, C, H, W] in channels_last, results of the operators as [B, H, W, C]
LIBRARY.define(
    "winograd_conv_relu(Tensor x, Tensor weight, Tensor? bias, int padding, Tensor? skip, "
    "bool pool, bool relu=True) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "winograd_grad_images(Tensor grad, Tensor weight, int padding, Tensor x, Tensor? skip, "
    "bool need_x, bool need_skip, bool relu_made_x) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "winograd_grad_weight(Tensor grad, Tensor x, Tensor? skip, int padding, bool need_bias) "
    "-> (Tensor, Tensor)"
)


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    skip: Tensor | None,
    pool: bool,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Convolution, bias, ReLU and pooled copy, as asked for."""
    x, skip = _channels_last(x), None if skip is None else _channels_last(skip)
    y, pooled = torch.ops.fastunet.winograd_conv_relu(x, weight, bias, padding, skip, pool, relu)
    return _images(y), _images(pooled) if pool else pooled


def grad_images(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    needed: tuple[bool, bool],
    relu_made_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, zero where ``relu_made_x`` and x is not above zero, and of skip."""
    need_x, need_skip = needed
    mask = _channels_last(x) if relu_made_x else x
    grad_x, grad_skip = torch.ops.fastunet.winograd_grad_images(
        _channels_last(grad), weight, padding, mask, skip, need_x, need_skip, relu_made_x
    )
    if need_x:
        grad_x = laid_out_like(_images(grad_x), x)
    if need_skip and skip is not None:
        grad_skip = laid_out_like(_images(grad_skip), skip)
    return grad_x, grad_skip


def grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, skip: Tensor | None, padding: int, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias."""
    x, skip = _channels_last(x), None if skip is None else _channels_last(skip)
    of_weight, of_bias = torch.ops.fastunet.winograd_grad_weight(
        _channels_last(grad), x, skip, padding, need_bias
    )
    return laid_out_like(_images(of_weight), weight), of_bias


def _channels_last(images: Tensor) -> Tensor:
    """``images``, or a copy, with the channels of a pixel next to each other."""
    if images.stride(1) == 1 or images.shape[1] == 1:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _images(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)
