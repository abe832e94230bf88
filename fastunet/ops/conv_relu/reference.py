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
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
) -> Tensor:
    """The convolution, bias and ReLU; [B, C_out, H', W'] with H' = H - 2 + 2 padding.

    The ``flags`` are those of the gradient.
    """
    return conv3x3_reference(x, weight, bias, padding, skip).relu_()


def conv3x3_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None
) -> Tensor:
    """The convolution and bias alone."""
    source = x if skip is None else crop_concat_reference(skip, x)
    y = F.conv2d(source, weight, bias, padding=padding)
    return y.contiguous(memory_format=torch.channels_last) if source.shape[1] == 1 else y


def is_channels_last(x: Tensor, weight: Tensor, skip: Tensor | None) -> bool:
    """Whether the result is in channels_last, the layout of the fast paths.

    It is if the images or the weights are, as conv2d has it, and where the image has one channel,
    which could be either: a grey image leads the whole network onto the fast path.
    """
    images = [x] if skip is None else [x, skip]
    return weight.shape[1] == 1 or _in_order(weight) or all(map(_in_order, images))


def _in_order(tensor: Tensor) -> bool:
    # one channel or one pixel is in every order
    return (
        tensor.is_contiguous(memory_format=torch.channels_last)
        and tensor.stride(1) == 1
        and not tensor.is_contiguous()
    )


def conv_relu_pool_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
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
    relu_made_x: bool,
    grad_is_masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and skip; one that is not ``needed`` comes back empty.

    Where one ``conv_relu`` feeds another and nothing else, the second multiplies the gradient of
    its x by [x > 0] (``relu_made_x``), and the first need not (``grad_is_masked``).
    """
    if grad_pooled is not None:
        grad_y = grad_y + _unpool(grad_pooled, y)
    masked = grad_y if grad_is_masked else torch.ops.aten.threshold_backward(grad_y, y, 0)
    need_x, need_weight, need_bias, need_skip = needed
    source = x if skip is None else crop_concat_reference(skip, x)
    grad_source, grad_weight, grad_bias = convolution_gradients(
        masked, source, weight, padding, [need_x or need_skip, need_weight, need_bias]
    )
    grad_x = grad_skip = x.new_empty(0)
    c = 0 if skip is None else skip.shape[1]
    if need_x:
        grad_x = laid_out_like(grad_source[:, c:], x)
        if relu_made_x:
            grad_x = torch.ops.aten.threshold_backward(grad_x, x, 0)
    if need_skip and skip is not None:
        grad_skip = uncrop(grad_source[:, :c], skip)
    if need_weight:
        grad_weight = laid_out_like(grad_weight, weight)
    return grad_x, grad_weight, grad_bias, grad_skip


def relu_pool_reference(y: Tensor, pool: bool) -> Tensor:
    """Clamp ``y`` at zero in place; its max-pooled copy, or nothing.

    Args:
        y: [B, H, W, C], pixel by pixel.
        pool: whether to pool.
    Returns: [B, H // 2, W // 2, C] with ``pool``, otherwise an empty tensor.
    """
    y.relu_()
    if not pool:
        return y.new_empty(0)
    return F.max_pool2d(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def relu_pool_bwd_reference(grad_y: Tensor, grad_pooled: Tensor | None, y: Tensor) -> Tensor:
    """The gradient before the ReLU; all arguments pixel by pixel, as in ``relu_pool_reference``."""
    if grad_pooled is not None:
        unpooled = _unpool(grad_pooled.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2))
        grad_y = grad_y + unpooled.permute(0, 2, 3, 1)
    return torch.ops.aten.threshold_backward(grad_y.contiguous(), y, 0)


def convolution_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: int,
    needed: list[bool],
    *,
    stride: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of the convolution; empty where not needed."""
    channels, steps, pads = [grad.shape[1]], [stride] * 2, [padding] * 2
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, channels, steps, pads, [1, 1], transposed, [0, 0], 1, needed
    )
    empty = x.new_empty(0)
    grad_x, grad_weight, grad_bias = (
        got if need else empty for got, need in zip(grads, needed, strict=True)
    )
    return grad_x, grad_weight, grad_bias


def laid_out_like(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` with the memory layout of ``like``, copied only if it has another."""
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def _unpool(grad_pooled: Tensor, y: Tensor) -> Tensor:
    """``grad_pooled`` at the first maximum of each 2x2 block of ``y``, zeros elsewhere."""
    _, indices = torch.ops.aten.max_pool2d_with_indices(y, [2, 2])
    return torch.ops.aten.max_pool2d_with_indices_backward(
        grad_pooled, y, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
    )
