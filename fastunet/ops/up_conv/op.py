"""``up_conv``: schema, who serves which device, autograd, the public function."""

from typing import Any

import torch
from torch import Tensor

from .. import eager
from .._check import bad_value, check_floating, check_same_kind, check_shape, check_tensor, describe
from .._library import (
    LIBRARY,
    lower_precision,
    register_autocast,
    register_triton,
    waits_for_python,
)
from .onednn import up_conv_bwd_onednn, up_conv_onednn
from .reference import up_conv_bwd_reference, up_conv_reference

LIBRARY.define("up_conv(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define(
    "up_conv_bwd(Tensor grad, Tensor x, Tensor weight, bool[3] needed) -> (Tensor, Tensor, Tensor)"
)
for _name, _reference, _cpu in (
    ("up_conv", up_conv_reference, up_conv_onednn),
    ("up_conv_bwd", up_conv_bwd_reference, up_conv_bwd_onednn),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cpu, "CPU")
    register_triton(_name, "fastunet.ops.up_conv.gpu")
    torch.library.register_fake(f"fastunet::{_name}", _cpu, lib=LIBRARY)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad)
    grads = torch.ops.fastunet.up_conv_bwd(grad, *ctx.saved_tensors, needed)
    return tuple(got if need else None for got, need in zip(grads, needed, strict=True))


torch.library.register_autograd("fastunet::up_conv", _backward, setup_context=_save, lib=LIBRARY)
register_autocast("up_conv", lower_precision)
_OPERATOR = torch.ops.fastunet.up_conv.default


def up_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """2x2 up-convolution of stride 2 and bias; the green arrow of the figure.

        conv_transpose2d(x, weight, bias, stride=2)

    Args:
        x: [B, C, H, W] floating point, any memory layout; channels_last is the fast one.
        weight: [C, C_out, 2, 2], as ``torch.nn.ConvTranspose2d`` holds it.
        bias: [C_out], or None for no bias.
    Returns: [B, C_out, 2 H, 2 W] of ``x``'s dtype.
    Raises: TypeError for arguments that are not floating-point tensors of one dtype; ValueError for
        shapes or devices that do not go together.
    Source: Ronneberger et al. 2015, figure 1.
    """
    check_tensor("up_conv", "x", x)
    check_floating("up_conv", "x", x)
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise bad_value("up_conv", "x", "[B, C, H, W] with pixels", describe(x))
    check_tensor("up_conv", "weight", weight)
    check_same_kind("up_conv", "weight", weight, "x", x)
    if weight.ndim != 4 or weight.shape[0] != x.shape[1] or tuple(weight.shape[2:]) != (2, 2):
        raise bad_value("up_conv", "weight", f"[{x.shape[1]}, C_out, 2, 2]", describe(weight))
    if bias is not None:
        check_tensor("up_conv", "bias", bias)
        check_same_kind("up_conv", "bias", bias, "x", x)
        check_shape("up_conv", "bias", bias, [weight.shape[1]])
    elements = 4 * weight.shape[1] * x.shape[0] * x.shape[2] * x.shape[3]
    if waits_for_python(elements, x, weight, bias):
        return eager.up_conv(x, weight, bias)
    return _OPERATOR(x, weight, bias)
