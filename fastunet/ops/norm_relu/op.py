"""``norm_relu``: schema, the CPU's kernels, autograd, running statistics."""

from typing import Any

import torch
from torch import Tensor, nn

from ...backends import EXTENSION_MISSING
from .._library import LIBRARY
from .reference import norm_relu_bwd_reference, norm_relu_reference

LIBRARY.define(
    "norm_relu(Tensor x, Tensor? weight, Tensor? bias, float eps, bool pool) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "norm_relu_bwd(Tensor grad_y, Tensor? grad_pooled, Tensor y, Tensor x, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor var, float eps, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)"
)
# on the CPU, of images as [B, H, W, C]
LIBRARY.define(
    "norm_relu_pixels(Tensor x, Tensor? weight, Tensor? bias, float eps, bool pool) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "norm_relu_pixels_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, float eps, bool is_masked, bool need_x) -> (Tensor, Tensor, Tensor)"
)


# over all images: for more, PyTorch's statistics of channels_last images are less accurate
FEW_PIXELS = 256


def unsupported(x: Tensor, norm: nn.BatchNorm2d) -> str | None:
    """Why the CPU's kernels do not take the normalisation of ``x``, or None."""
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if x.device.type != "cpu":
        return f"{x.device.type} has the library's kernels"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is not float32 or bfloat16"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the images are not in channels_last"
    if x.numel() <= FEW_PIXELS * x.shape[1]:
        return "for so few pixels PyTorch's is as accurate, and as fast"
    if type(norm) is not nn.BatchNorm2d or (norm.track_running_stats and norm.momentum is None):
        return "it is no plain BatchNorm2d with a momentum"
    return None


def _norm_relu_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``norm_relu_reference``."""
    pixels = x.permute(0, 2, 3, 1)
    y, pooled, mean, var = torch.ops.fastunet.norm_relu_pixels(pixels, weight, bias, eps, pool)
    return y.permute(0, 3, 1, 2), pooled.permute(0, 3, 1, 2) if pool else pooled, mean, var


def _norm_relu_bwd_cpu(
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
    """As ``norm_relu_bwd_reference``."""
    grad, pixels = grad_y.permute(0, 2, 3, 1).contiguous(), x.permute(0, 2, 3, 1)
    is_masked = grad_pooled is not None
    if grad_pooled is not None:
        of_pooled = grad_pooled.permute(0, 2, 3, 1)
        grad = torch.ops.fastunet.relu_pool_bwd(grad, of_pooled, y.permute(0, 2, 3, 1))
    need_x, need_weight, need_bias = needed
    grad_x, grad_weight, grad_bias = torch.ops.fastunet.norm_relu_pixels_bwd(
        grad, pixels, weight, bias, mean, var, eps, is_masked, need_x
    )
    empty = x.new_empty(0)
    return (
        grad_x.permute(0, 3, 1, 2) if need_x else empty,
        grad_weight.to(weight.dtype) if need_weight and weight is not None else empty,
        grad_bias.to(bias.dtype) if need_bias and bias is not None else empty,
    )


for _name, _reference, _kernel in (
    ("norm_relu", norm_relu_reference, _norm_relu_cpu),
    ("norm_relu_bwd", norm_relu_bwd_reference, _norm_relu_bwd_cpu),
):
    LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"fastunet::{_name}", _reference, lib=LIBRARY)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps, ctx.pool = inputs
    y, _, mean, var = output
    # without pooling the mask is made from x anew
    ctx.save_for_backward(y if ctx.pool else x, x, weight, bias, mean, var)


def _backward(
    ctx: Any, grad_y: Tensor, grad_pooled: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    grads = torch.ops.fastunet.norm_relu_bwd(
        grad_y, grad_pooled if ctx.pool else None, *ctx.saved_tensors, ctx.eps, needed
    )
    given = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return (*given, None, None)


torch.library.register_autograd("fastunet::norm_relu", _backward, setup_context=_save, lib=LIBRARY)
_OPERATOR = torch.ops.fastunet.norm_relu.default


def norm_relu(x: Tensor, norm: nn.BatchNorm2d, *, pool: bool = False) -> Any:
    """``relu(norm(x))`` by the statistics of the batch, which the running ones follow.

    Args:
        x: [B, C, H, W] for which nothing is ``unsupported``.
        norm: holds the weights, and running statistics unless it tracks none.
        pool: also return the 2x2 max-pooled output.
    Returns: [B, C, H, W] of ``x``'s dtype; with ``pool`` a pair of that and its pooled copy.
    """
    y, pooled, mean, var = _OPERATOR(x, norm.weight, norm.bias, norm.eps, pool)
    if norm.training and norm.track_running_stats:
        _follow(norm, mean, var, x.numel() // x.shape[1])
    return (y, pooled) if pool else y


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics towards those of a batch of ``count`` pixels."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    assert norm.momentum is not None
    unbiased = var * (count / (count - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        assert running is not None
        running.lerp_(now.to(running.dtype), norm.momentum)
