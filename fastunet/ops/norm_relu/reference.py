"""Batch normalisation in training, ReLU and optional 2x2 max-pooling.

    x^ = (x - mean) / sqrt(var + eps)    y = max(0, gamma x^ + beta)

with mean and var those of each channel over all N pixels of the batch. With m = [y > 0] and g the
gradient of y (plus that of the pooled copy at each block's maximum):

    grad_beta = sum(m g)    grad_gamma = sum(m g x^)
    grad_x = gamma / sqrt(var + eps) (m g - grad_beta / N - x^ grad_gamma / N)

Source: Ioffe and Szegedy 2015, algorithm 1.
"""

import torch
from torch import Tensor

from ..conv_relu.reference import relu_pool_bwd_reference, relu_pool_reference


def norm_relu_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and its pooled copy, empty without ``pool``; mean and variance [C], of float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(wide), (0, 2, 3), correction=0)
    y = torch.ops.aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0]
    y = y.contiguous(memory_format=torch.channels_last)
    pooled = relu_pool_reference(y.permute(0, 2, 3, 1), pool)
    return y, pooled.permute(0, 3, 1, 2) if pool else pooled, mean, var


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
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; one that is not ``needed`` comes back empty."""
    masked = relu_pool_bwd_reference(
        grad_y.permute(0, 2, 3, 1),
        None if grad_pooled is None else grad_pooled.permute(0, 2, 3, 1),
        y.permute(0, 2, 3, 1),
    ).permute(0, 3, 1, 2)
    inv_std = (var + eps).rsqrt()
    grads = torch.ops.aten.native_batch_norm_backward(
        masked, x, weight, None, None, mean, inv_std, True, eps, needed
    )
    grad_x, grad_weight, grad_bias = (
        grad if need else x.new_empty(0) for grad, need in zip(grads, needed, strict=True)
    )
    return grad_x.contiguous(memory_format=torch.channels_last), grad_weight, grad_bias
