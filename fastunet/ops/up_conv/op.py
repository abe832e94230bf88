"""``up_conv``: schema, who serves which device, autograd, the public function."""

from typing import Any

import torch
from torch import Tensor

from .. import _amx
from .._check import (
    bad_value,
    check_floating,
    check_same_kind,
    check_shape,
    check_tensor,
    describe,
)
from .._library import LIBRARY, lower_precision, register_autocast
from ..conv_relu.reference import laid_out_like
from .reference import is_channels_last, up_conv_bwd_reference, up_conv_reference

LIBRARY.define("up_conv(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor")
LIBRARY.define(
    "up_conv_bwd(Tensor grad_y, Tensor? y, Tensor x, Tensor weight, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)"
)


def up_conv_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """As ``up_conv_reference``."""
    if _amx.unsupported_up(x, weight) or not is_channels_last(x, weight):
        return up_conv_reference(x, weight, bias, relu)
    return _amx.up_conv(x, weight, bias, relu)


def up_conv_bwd_cpu(
    grad_y: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``up_conv_bwd_reference``."""
    need_x, *others = needed
    if not need_x or _amx.unsupported_up(x, weight) or not is_channels_last(x, weight):
        return up_conv_bwd_reference(grad_y, y, x, weight, needed)
    if y is not None:
        grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
    _, grad_weight, grad_bias = up_conv_bwd_reference(grad_y, None, x, weight, [False, *others])
    return laid_out_like(_amx.up_conv_grad(grad_y, weight), x), grad_weight, grad_bias


for _name, _reference, _kernel in (
    ("up_conv", up_conv_reference, up_conv_cpu),
    ("up_conv_bwd", up_conv_bwd_reference, up_conv_bwd_cpu),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"fastunet::{_name}", _reference, lib=LIBRARY)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, weight, _, ctx.relu = inputs
    # without a ReLU backward needs no output: it may be freed, or changed in place
    ctx.save_for_backward(x, weight, *([output] if ctx.relu else []))


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *y = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    grads = torch.ops.fastunet.up_conv_bwd(grad_y, y[0] if y else None, x, weight, needed)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None)


torch.library.register_autograd("fastunet::up_conv", _backward, setup_context=_save, lib=LIBRARY)
register_autocast("up_conv", lower_precision)
_OPERATOR = torch.ops.fastunet.up_conv.default


def up_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """Double height and width by a 2x2 transposed convolution; the green arrow of the figure.

        conv_transpose2d(x, weight, bias, stride=2), with relu() around it on request

    Args:
        x: [B, C, H, W] floating point, any memory layout; channels_last is the fast one.
        weight: [C, C_out, 2, 2], as ``torch.nn.ConvTranspose2d`` holds it.
        bias: [C_out], or None for no bias.
        relu: clamp at zero, as the authors' released network does.
    Returns: [B, C_out, 2 H, 2 W] of ``x``'s dtype.
    Raises: TypeError for arguments that are not floating-point tensors of one dtype; ValueError for
        shapes or devices that cannot work.
    Source: Ronneberger et al. 2015, figure 1.
    """
    check_tensor("up_conv", "x", x)
    check_floating("up_conv", "x", x)
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise bad_value("up_conv", "x", "[B, C, H, W] with pixels and channels", describe(x))
    check_tensor("up_conv", "weight", weight)
    check_same_kind("up_conv", "weight", weight, "x", x)
    if weight.ndim != 4 or weight.shape[0] != x.shape[1] or tuple(weight.shape[2:]) != (2, 2):
        raise bad_value("up_conv", "weight", f"[{x.shape[1]}, C_out, 2, 2]", describe(weight))
    if bias is not None:
        check_tensor("up_conv", "bias", bias)
        check_same_kind("up_conv", "bias", bias, "x", x)
        check_shape("up_conv", "bias", bias, [weight.shape[1]])
    return _OPERATOR(x, weight, bias, relu)
