"""``conv_softmax`` and ``conv_argmax``: schemas, who serves which device, public functions."""

import torch
from torch import Tensor

from ...backends import EXTENSION_MISSING
from .. import eager
from .._check import bad_value, check_floating, check_same_kind, check_shape, check_tensor, describe
from .._library import LIBRARY, lower_precision, register_autocast, register_triton
from .cpu import conv_argmax_cpu, conv_softmax_cpu
from .reference import conv_argmax_reference, conv_softmax_reference

for _name, _reference, _cpu in (
    ("conv_softmax", conv_softmax_reference, conv_softmax_cpu),
    ("conv_argmax", conv_argmax_reference, conv_argmax_cpu),
):
    LIBRARY.define(f"{_name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    if not EXTENSION_MISSING:
        LIBRARY.impl(_name, _cpu, "CPU")
    register_triton(_name, "fastunet.ops.conv_softmax.gpu")
    torch.library.register_fake(f"fastunet::{_name}", _reference, lib=LIBRARY)
    register_autocast(_name, lower_precision)
_CONV_SOFTMAX = torch.ops.fastunet.conv_softmax.default
_CONV_ARGMAX = torch.ops.fastunet.conv_argmax.default


def conv_softmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Probabilities of the classes: 1x1 convolution, bias and softmax; the figure's last arrow.

        softmax(conv2d(x, weight, bias), dim=1)

    Args:
        x: [B, C, H, W] floating point, any memory layout; channels_last is the fast one.
        weight: [K, C, 1, 1], as ``torch.nn.Conv2d`` holds it.
        bias: [K], or None for no bias.
    Returns: [B, K, H, W] float32, of float64 ``x`` float64, contiguous: a plane a class.
        With gradients it is PyTorch's convolution and softmax, and so is backward.
    Raises: TypeError for arguments that are not floating-point tensors of one dtype; ValueError for
        shapes or devices that do not go together.
    Source: Ronneberger et al. 2015, figure 1 and section 3.
    """
    _check("conv_softmax", x, weight, bias)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return eager.conv_softmax(x, weight, bias)
    return _CONV_SOFTMAX(x, weight, bias)


def conv_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The most probable class of each pixel: 1x1 convolution, bias and argmax.

        argmax(conv2d(x, weight, bias), dim=1)

    Args:
        x: [B, C, H, W] as of ``conv_softmax``.
        weight: [K, C, 1, 1].
        bias: [K] or None.
    Returns: [B, H, W] uint8, int32 for more than 256 classes; of equal ones the first, and NaN
        is the largest, as ``torch.argmax`` has it. Not differentiable.
    Raises: as ``conv_softmax``.
    Source: Ronneberger et al. 2015, figure 1 and section 3.
    """
    _check("conv_argmax", x, weight, bias)
    return _CONV_ARGMAX(x, weight, bias)


def _check(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor(operator, "x", x)
    check_floating(operator, "x", x)
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise bad_value(operator, "x", "[B, C, H, W] with pixels", describe(x))
    check_tensor(operator, "weight", weight)
    check_same_kind(operator, "weight", weight, "x", x)
    if weight.ndim != 4 or len(weight) < 1 or tuple(weight.shape[1:]) != (x.shape[1], 1, 1):
        raise bad_value(operator, "weight", f"[K, {x.shape[1]}, 1, 1]", describe(weight))
    if bias is not None:
        check_tensor(operator, "bias", bias)
        check_same_kind(operator, "bias", bias, "x", x)
        check_shape(operator, "bias", bias, [weight.shape[0]])
