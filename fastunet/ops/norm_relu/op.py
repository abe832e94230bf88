"""``norm_relu``: schema, the CPU's kernels, autograd, running statistics."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from ...backends import EXTENSION_MISSING
from .._library import LIBRARY
from .reference import norm_relu_bwd_reference, norm_relu_reference

LIBRARY.define(
    "norm_relu(Tensor x, Tensor? weight, Tensor? bias, float eps, float negative_slope, "
    "bool by_image, bool pool) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "norm_relu_bwd(Tensor grad_y, Tensor? grad_pooled, Tensor y, Tensor x, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor var, float eps, float negative_slope, bool by_image, "
    "bool[3] needed) -> (Tensor, Tensor, Tensor)"
)
# on the CPU, of images as [B, H, W, C]
LIBRARY.define(
    "norm_relu_pixels(Tensor x, Tensor? weight, Tensor? bias, float eps, float negative_slope, "
    "bool by_image, bool pool) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "norm_relu_pixels_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, float eps, float negative_slope, bool by_image, bool is_masked, bool need_x) "
    "-> (Tensor, Tensor, Tensor)"
)


Norm = nn.BatchNorm2d | nn.InstanceNorm2d

# over all images: for more, PyTorch's statistics of channels_last images are less accurate
FEW_PIXELS = 256


def why_not(norm: nn.Module) -> str | None:
    """Why no kernel does what ``norm`` does with any images, or None."""
    if type(norm) not in get_args(Norm):
        return f"a {type(norm).__name__} is no plain BatchNorm2d or InstanceNorm2d"
    if type(norm) is nn.InstanceNorm2d:
        return "it tracks statistics of images" if norm.track_running_stats else None
    if norm.track_running_stats and norm.momentum is None:
        return "its running statistics are those of all batches"
    return None


def unsupported(x: Tensor, norm: nn.Module) -> str | None:
    """Why the CPU's kernels do not take the normalisation of ``x``, or None."""
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if x.device.type != "cpu":
        return f"{x.device.type} has the library's kernels"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is not float32 or bfloat16"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the images are not in channels_last"
    by_image = isinstance(norm, nn.InstanceNorm2d)
    pixels = x.shape[2] * x.shape[3] * (1 if by_image else x.shape[0])
    if x.numel() == 0 or pixels <= (1 if by_image else FEW_PIXELS):
        return "for so few pixels PyTorch's is as accurate, and as fast"
    return why_not(norm)


def _norm_relu_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    by_image: bool,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``norm_relu_reference``."""
    y, pooled, mean, var = torch.ops.fastunet.norm_relu_pixels(
        x.permute(0, 2, 3, 1), weight, bias, eps, negative_slope, by_image, pool
    )
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
    negative_slope: float,
    by_image: bool,
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
        grad, pixels, weight, bias, mean, var, eps, negative_slope, by_image, is_masked, need_x
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
    x, weight, bias, *ctx.options, ctx.pool = inputs
    y, _, mean, var = output
    # without pooling the mask is made from x anew
    ctx.save_for_backward(y if ctx.pool else x, x, weight, bias, mean, var)


def _backward(
    ctx: Any, grad_y: Tensor, grad_pooled: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    grads = torch.ops.fastunet.norm_relu_bwd(
        grad_y, grad_pooled if ctx.pool else None, *ctx.saved_tensors, *ctx.options, needed
    )
    given = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return (*given, None, None, None, None)


torch.library.register_autograd("fastunet::norm_relu", _backward, setup_context=_save, lib=LIBRARY)
_OPERATOR = torch.ops.fastunet.norm_relu.default


def norm_relu(x: Tensor, norm: Norm, *, negative_slope: float = 0.0, pool: bool = False) -> Any:
    """``leaky_relu(norm(x), negative_slope)`` by the statistics of the batch, or of each image.

    The running statistics of a batch normalisation follow.

    Args:
        x: [B, C, H, W] for which nothing is ``unsupported``.
        norm: holds the weights, and running statistics unless it tracks none.
        negative_slope: the slope below zero; 0 for ReLU, 1 for the normalised values as they are.
        pool: also return the 2x2 max-pooled output; with ``negative_slope`` 0.
    Returns: [B, C, H, W] of ``x``'s dtype; with ``pool`` a pair of that and its pooled copy.
    """
    by_image = isinstance(norm, nn.InstanceNorm2d)
    y, pooled, mean, var = _OPERATOR(
        x, norm.weight, norm.bias, norm.eps, negative_slope, by_image, pool
    )
    if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.track_running_stats:
        _follow(norm, mean[0], var[0], x.numel() // x.shape[1])
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
