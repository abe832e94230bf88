"""Normalisation by the images' own statistics, ReLU or LeakyReLU, and optional 2x2 max-pooling.

    x^ = (x - mean) / sqrt(var + eps)    z = gamma x^ + beta    y = z where z > 0, else slope z

with mean and var those of each channel over the N pixels of the batch, or of each image. A slope of
0 is ReLU, with 1 there is none. With m = 1 where z > 0, else the slope, and g the gradient of y
(plus that of the pooled copy at each block's maximum), and sums over the same pixels:

    grad_beta = sum(m g)    grad_gamma = sum(m g x^)
    grad_x = gamma / sqrt(var + eps) (m g - grad_beta / N - x^ grad_gamma / N)

By image, the gradients of gamma and beta are the sums of those of all images.

Source: Ioffe and Szegedy 2015, algorithm 1; Ulyanov, Vedaldi and Lempitsky 2016, equation 4.
"""

import torch
from torch import Tensor

from ..conv_relu.reference import relu_pool_bwd_reference, relu_pool_reference


def _apart(x: Tensor, by_image: bool) -> Tensor:
    """``x`` with the channels of each image as channels of their own, if it goes by image."""
    return x.reshape(1, -1, *x.shape[2:]) if by_image else x


def _repeated(values: Tensor | None, x: Tensor, by_image: bool) -> Tensor | None:
    return values.repeat(x.shape[0]) if by_image and values is not None else values


def norm_relu_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    by_image: bool,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and its pooled copy, empty without ``pool``; mean and variance of float32 at least.

    These are [1, C], or [B, C] ``by_image``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    axes = (2, 3) if by_image else (0, 2, 3)
    var, mean = (
        statistic.view(-1, x.shape[1])
        for statistic in torch.var_mean(x.to(wide), axes, correction=0)
    )
    parameters = [_repeated(values, x, by_image) for values in (weight, bias)]
    y = torch.ops.aten.native_batch_norm(
        _apart(x, by_image), *parameters, None, None, True, 0.0, eps
    )[0]
    y = y.view_as(x).contiguous(memory_format=torch.channels_last)
    if negative_slope == 0:
        pooled = relu_pool_reference(y.permute(0, 2, 3, 1), pool)
        return y, pooled.permute(0, 3, 1, 2) if pool else pooled, mean, var
    return torch.nn.functional.leaky_relu(y, negative_slope), y.new_empty(0), mean, var


def norm_relu_bwd_reference(
    grad_y: Tensor,
    grad_pooled: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    negative_slope: float,
    by_image: bool,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; one that is not ``needed`` comes back empty."""
    if negative_slope == 0:
        masked = relu_pool_bwd_reference(
            grad_y.permute(0, 2, 3, 1),
            None if grad_pooled is None else grad_pooled.permute(0, 2, 3, 1),
            y.permute(0, 2, 3, 1),
        ).permute(0, 3, 1, 2)
    else:
        masked = torch.ops.aten.leaky_relu_backward(grad_y, y, negative_slope, True)
    inv_std = (var + eps).rsqrt().flatten()
    images = (_apart(each, by_image) for each in (masked, x))
    factor = _repeated(weight, x, by_image)
    grads = torch.ops.aten.native_batch_norm_backward(
        *images, factor, None, None, mean.flatten(), inv_std, True, eps, needed
    )
    grad_x, grad_weight, grad_bias = (
        grad if need else x.new_empty(0) for grad, need in zip(grads, needed, strict=True)
    )
    if by_image:
        grad_weight, grad_bias = (
            grad.view(-1, x.shape[1]).sum(0) if need else grad
            for grad, need in zip((grad_weight, grad_bias), needed[1:], strict=True)
        )
    if needed[0]:
        grad_x = grad_x.view_as(x).contiguous(memory_format=torch.channels_last)
    return grad_x, grad_weight, grad_bias
