"""``conv_relu``: schema, who serves which device, autograd, the public function."""

from typing import Any

import torch
from torch import Tensor

from .. import eager
from .._check import (
    bad_value,
    check_floating,
    check_same_kind,
    check_shape,
    check_tensor,
    describe,
)
from .._library import (
    HAS_TRITON,
    LIBRARY,
    is_plain,
    lower_precision,
    register_autocast,
    register_triton,
    waits_for_python,
)
from .onednn import (
    conv3x3_onednn,
    conv_relu_bwd_onednn,
    conv_relu_onednn,
    conv_relu_pool_onednn,
)
from .reference import (
    conv3x3_reference,
    conv_relu_bwd_reference,
    conv_relu_pool_reference,
    conv_relu_reference,
    relu_pool_bwd_reference,
    relu_pool_reference,
)

_FLAGS = "bool relu_made_x=False, bool grad_is_masked=False"
_ARGUMENTS = f"Tensor x, Tensor weight, Tensor? bias, int padding, Tensor? skip, {_FLAGS}"

LIBRARY.define(f"conv_relu({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"conv_relu_pool({_ARGUMENTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, int padding, Tensor? skip) -> Tensor"
)
LIBRARY.define(
    "conv_relu_bwd(Tensor grad_y, Tensor? grad_pooled, Tensor y, Tensor x, Tensor weight, "
    "Tensor? skip, int padding, bool[4] needed, bool relu_made_x, bool grad_is_masked) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("relu_pool_(Tensor(a!) y, bool pool) -> Tensor")
LIBRARY.define("relu_pool_bwd(Tensor grad_y, Tensor? grad_pooled, Tensor y) -> Tensor")
for _name, _reference in (
    ("conv3x3", conv3x3_reference),
    ("conv_relu", conv_relu_reference),
    ("conv_relu_pool", conv_relu_pool_reference),
    ("conv_relu_bwd", conv_relu_bwd_reference),
    ("relu_pool_", relu_pool_reference),
    ("relu_pool_bwd", relu_pool_bwd_reference),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunet::{_name}", _reference, lib=LIBRARY)
for _name, _kernel in (
    ("conv_relu", conv_relu_onednn),
    ("conv_relu_pool", conv_relu_pool_onednn),
    ("conv_relu_bwd", conv_relu_bwd_onednn),
):
    LIBRARY.impl(_name, _kernel, "CPU")
    register_triton(_name, "fastunet.ops.conv_relu.gpu")


LIBRARY.impl("conv3x3", conv3x3_onednn, "CPU")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.padding, skip, *ctx.flags = inputs
    y = output if isinstance(output, Tensor) else output[0]
    ctx.save_for_backward(y, x, weight, skip)


def _gradients(ctx: Any, grad_y: Tensor, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
    y, x, weight, skip = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_skip, *_ = ctx.needs_input_grad
    needed = [need_x, need_weight, need_bias, need_skip]
    grads = torch.ops.fastunet.conv_relu_bwd(
        grad_y, grad_pooled, y, x, weight, skip, ctx.padding, needed, *ctx.flags
    )
    grad_x, grad_weight, grad_bias, grad_skip = (
        grad if need else None for grad, need in zip(grads, needed, strict=True)
    )
    return grad_x, grad_weight, grad_bias, None, grad_skip, None, None


def _conv_relu_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_y, None)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.padding, skip = inputs
    # no ReLU made a mask of the output
    ctx.save_for_backward(weight, x, weight, skip)
    ctx.flags = [False, True]


def _conv3x3_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_y, None)[:5]


for _name, _backward, _setup in (
    ("conv_relu", _conv_relu_backward, _save),
    ("conv_relu_pool", _gradients, _save),
    ("conv3x3", _conv3x3_backward, _save_linear),
):
    torch.library.register_autograd(
        f"fastunet::{_name}", _backward, setup_context=_setup, lib=LIBRARY
    )
    register_autocast(_name, lower_precision)

# looked up once: at the small levels microseconds count
_CONV_RELU = torch.ops.fastunet.conv_relu.default
_CONV_RELU_POOL = torch.ops.fastunet.conv_relu_pool.default
_CONV3X3 = torch.ops.fastunet.conv3x3.default


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """Convolve with 3x3 weights, add the bias, clamp at zero; the blue arrow of the figure.

        relu(conv2d(cat([centre_crop(skip), x], 1), weight, bias, padding=padding))

    In float32 on a CPU large layers run by Winograd's algorithm, unless ``use_winograd(False)``:
    results and gradients are off by up to 5e-6 of the largest, and NaN and infinity make NaN of
    whole 4x4 tiles.

    Args:
        x: [B, C, H, W] floating point, any memory layout; channels_last is the fast one.
        weight: [C_out, C_skip + C, 3, 3], as ``torch.nn.Conv2d`` holds it.
        bias: [C_out], or None for no bias.
        padding: 0 (the paper's unpadded convolution) or 1 (output as large as the input).
        skip: [B, C_skip, H_skip >= H, W_skip >= W], cropped centrally and put before ``x``.
        pool: also return the 2x2 max-pooled output.
    Returns: [B, C_out, H - 2 + 2 padding, W - 2 + 2 padding] of ``x``'s dtype; with ``pool`` a pair
        of that and its pooled copy, of half the height and width, rounded down.
    Raises: TypeError for arguments that are not floating-point tensors of one dtype; ValueError for
        shapes, devices or a padding that cannot work.
    Source: Ronneberger et al. 2015, figure 1.
    """
    done = _prepared(x, weight, bias, padding, skip, pool)
    if done is not None:
        return done
    _check(x, weight, bias, padding, skip, pool)
    if waits_for_python(_elements(x, weight, padding), x, weight, bias, skip):
        return eager.conv_relu(x, weight, bias, padding=padding, skip=skip, pool=pool)
    return (_CONV_RELU_POOL if pool else _CONV_RELU)(x, weight, bias, padding, skip)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    skip: Tensor | None = None,
) -> Tensor:
    """``conv_relu`` without the ReLU, for what is normalised before it; arguments as there."""
    _check(x, weight, bias, padding, skip, False)
    return _CONV3X3(x, weight, bias, padding, skip)


def conv_relu_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    padding: int = 0,
    skip: Tensor | None = None,
    pool: bool = False,
) -> Any:
    """Two blue arrows of the figure, one after the other: a level of the network.

        conv_relu(conv_relu(x, weight1, bias1, padding, skip), weight2, bias2, padding, pool)

    with a backward that multiplies the gradient between the two by the ReLU's mask where it is
    computed, instead of in a pass of its own.

    Args:
        x: [B, C, H, W] as of ``conv_relu``.
        weight1: [C_mid, C_skip + C, 3, 3].
        bias1: [C_mid] or None.
        weight2: [C_out, C_mid, 3, 3].
        bias2: [C_out] or None.
        padding: of both.
        skip: of the first.
        pool: of the second.
    Returns: as of the second ``conv_relu``.
    Raises: as ``conv_relu``.
    Source: Ronneberger et al. 2015, figure 1.
    """
    between = _prepared(x, weight1, bias1, padding, skip, False)
    if between is not None:
        return conv_relu(between, weight2, bias2, padding=padding, pool=pool)
    _check(x, weight1, bias1, padding, skip, False)
    if waits_for_python(_elements(x, weight1, padding), x, weight1, bias1, weight2, bias2, skip):
        between = eager.conv_relu(x, weight1, bias1, padding=padding, skip=skip)
        return conv_relu(between, weight2, bias2, padding=padding, pool=pool)
    between = _CONV_RELU(x, weight1, bias1, padding, skip, False, grad_is_masked=True)
    _check(between, weight2, bias2, padding, None, pool)
    operator = _CONV_RELU_POOL if pool else _CONV_RELU
    return operator(between, weight2, bias2, padding, None, relu_made_x=True)


def _elements(x: Tensor, weight: Tensor, padding: int) -> int:
    """Of the output."""
    b, _, height, width = x.shape
    return b * weight.shape[0] * (height - 2 + 2 * padding) * (width - 2 + 2 * padding)


def _prepared(*arguments: Any) -> Any:
    """The result of a plain call on a GPU like one before, else None."""
    x, weight, bias, padding, skip, _ = arguments
    on_gpu = HAS_TRITON and isinstance(x, Tensor) and x.is_cuda and isinstance(padding, int)
    if not on_gpu or not is_plain(x, weight, bias, skip):
        return None
    from .gpu import prepared

    return prepared(*arguments)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, pool: bool
) -> None:
    check_tensor("conv_relu", "x", x)
    check_floating("conv_relu", "x", x)
    if x.ndim != 4:
        raise bad_value("conv_relu", "x", "[B, C, H, W]", describe(x))
    if padding not in (0, 1):
        raise bad_value("conv_relu", "padding", "0 or 1", padding)
    channels = x.shape[1]
    if skip is not None:
        check_tensor("conv_relu", "skip", skip)
        check_same_kind("conv_relu", "skip", skip, "x", x)
        if (
            skip.ndim != 4
            or skip.shape[0] != x.shape[0]
            or skip.shape[2] < x.shape[2]
            or skip.shape[3] < x.shape[3]
        ):
            want = f"[{x.shape[0]}, C, H >= {x.shape[2]}, W >= {x.shape[3]}]"
            raise bad_value("conv_relu", "skip", want, describe(skip))
        channels = channels + skip.shape[1]
    check_tensor("conv_relu", "weight", weight)
    check_same_kind("conv_relu", "weight", weight, "x", x)
    if weight.ndim != 4 or weight.shape[1] != channels or tuple(weight.shape[2:]) != (3, 3):
        raise bad_value("conv_relu", "weight", f"[C_out, {channels}, 3, 3]", describe(weight))
    if bias is not None:
        check_tensor("conv_relu", "bias", bias)
        check_same_kind("conv_relu", "bias", bias, "x", x)
        check_shape("conv_relu", "bias", bias, [weight.shape[0]])
    smallest = 3 - 2 * padding + (1 if pool else 0)
    if x.shape[2] < smallest or x.shape[3] < smallest:
        want = f"at least {smallest} x {smallest} pixels with padding={padding}, pool={pool}"
        raise bad_value("conv_relu", "x", want, describe(x))
