"""``conv_relu`` on GPUs: each of a layer's three convolutions by our kernel or the library's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import MOST_PLANS, gpu, signature
from ..crop_concat.reference import centre_crop
from . import tiles
from .reference import (
    conv_relu_bwd_reference,
    conv_relu_pool_reference,
    conv_relu_reference,
    convolution_gradients,
    is_channels_last,
    laid_out_like,
)
from .tiles import Problem, Tile
from .triton_gradients import data_gradient, mask_gradient, sum_of_pixels, weight_gradient
from .triton_kernels import convolve, why_not_tma


def unsupported(x: Tensor, weight: Tensor, skip: Tensor | None) -> str | None:
    """Why neither kernel takes a call, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{x.dtype} is not float16, bfloat16 or float32"
    if x.dtype == torch.float32 and x.is_cuda and not _allows_tf32():
        return "float32 without TF32 is the library's"
    if min(x.numel(), weight.numel()) == 0 or (skip is not None and skip.numel() == 0):
        return "there are no pixels or channels"
    if not is_channels_last(x, weight, skip):
        return "the images are not in channels_last"
    return None


def conv_relu_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
) -> Tensor:
    """As ``conv_relu_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_reference(x, weight, bias, padding, skip, *flags)
    return _chosen_forward(x, weight, bias, padding, skip, False)[0]


def conv_relu_pool_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
) -> tuple[Tensor, Tensor]:
    """As ``conv_relu_pool_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_pool_reference(x, weight, bias, padding, skip, *flags)
    return _chosen_forward(x, weight, bias, padding, skip, True)


def conv_relu_bwd_triton(
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
    """As ``conv_relu_bwd_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_bwd_reference(
            grad_y, grad_pooled, y, x, weight, skip, padding, needed, relu_made_x, grad_is_masked
        )
    need_x, need_weight, need_bias, need_skip = needed
    empty = x.new_empty(0)
    if grad_is_masked:
        masked = grad_y.contiguous(memory_format=torch.channels_last)
        grad_bias = sum_of_pixels(masked) if need_bias else empty
    else:
        masked, grad_bias = mask_gradient(grad_y, grad_pooled, y, need_bias)
    grad_x = grad_skip = grad_weight = empty
    if need_x or need_skip:
        tile = choose(
            ("data", relu_made_x, signature(x, masked, weight, skip)),
            lambda: data_problem(x, weight, skip, relu_made_x),
            *(x, masked, weight, skip),
        )
        mask = x if relu_made_x else None
        grad_x, grad_skip = data_gradients(
            masked, x, weight, skip, padding, mask, [need_x, need_skip], tile
        )
    if need_weight:
        tile = choose(
            ("weight", padding, signature(x, masked, skip)),
            lambda: weight_problem(x, weight, padding, skip),
            *(x, masked, skip),
        )
        grad_weight = weight_gradients(masked, x, weight, skip, padding, tile)
    return grad_x, grad_weight, grad_bias, grad_skip


def forward_problem(
    x: Tensor, weight: Tensor, padding: int, skip: Tensor | None, pool: bool
) -> Problem:
    """The convolution of the forward pass."""
    c_skip = 0 if skip is None else skip.shape[1]
    height, width = (n - 2 + 2 * padding for n in x.shape[2:])
    layer = (x.shape[0], c_skip, x.shape[1], weight.shape[0], height, width)
    return Problem("forward", x.dtype, *layer, pool)


def data_problem(x: Tensor, weight: Tensor, skip: Tensor | None, masked: bool) -> Problem:
    """The convolution whose result is the gradient of skip and x."""
    c_out, c_all = weight.shape[:2]
    (b, _, height, width), c_skip = x.shape, 0 if skip is None else skip.shape[1]
    return Problem("data gradient", x.dtype, b, c_skip, c_out, c_all, height, width, masked=masked)


def weight_problem(x: Tensor, weight: Tensor, padding: int, skip: Tensor | None) -> Problem:
    """The matrix product whose result is the gradient of the weights."""
    return replace(forward_problem(x, weight, padding, skip, False), kind="weight gradient")


# what was chosen for tensors of a signature: a choice takes as long as a small kernel runs
CHOSEN: dict[tuple[Any, ...], Tile | None] = {}


def choose(
    known: tuple[Any, ...], problem: Callable[[], Problem], *tensors: Tensor | None
) -> Tile | None:
    """The kernel for ``problem``, or None for the library's.

    Args:
        known: all that the problem depends on, the tensors' signature among it.
        problem: makes it, for what is new.
        tensors: images that the kernel reads, and weights.
    """
    if known not in CHOSEN:
        if len(CHOSEN) >= MOST_PLANS:
            CHOSEN.clear()
        given = [tensor for tensor in tensors if tensor is not None]
        device = given[0].device
        tile = tiles.choose(problem(), gpu(device), tiles.cached(device))
        unaligned = tile is not None and tile.kernel == "tma" and why_not_tma(*given)
        CHOSEN[known] = None if unaligned else tile
    return CHOSEN[known]


def _chosen_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor]:
    signed = signature(x, weight, bias, skip)
    tile = choose(
        ("forward", padding, pool, signed),
        lambda: forward_problem(x, weight, padding, skip, pool),
        *(x, weight, skip),
    )
    return forward(x, weight, bias, padding, skip, pool, tile, signed)


def prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, pool: bool
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The operator's result for what it was called with before, else None.

    Checks and dispatch, which small images spend more time on than on the convolution, are left
    out. float32 is too: what it may be computed in can have changed.
    """
    signed = signature(x, weight, bias, skip)
    known = ("forward", padding, pool, signed)
    if x.dtype == torch.float32 or known not in CHOSEN:
        return None
    if x.get_device() != torch.cuda.current_device():
        return None
    y, pooled = forward(x, weight, bias, padding, skip, pool, CHOSEN[known], signed)
    return (y, pooled) if pool else y


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    skip: Tensor | None,
    pool: bool,
    tile: Tile | None,
    signed: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """y and its pooled copy, which is empty without ``pool``."""
    b, _, height, width = x.shape
    height, width = height - 2 + 2 * padding, width - 2 + 2 * padding
    if tile is None or tile.kernel == "cudnn":
        y = _library_forward(x, weight, bias, padding, skip, tile is not None)
        return y, F.max_pool2d(y, 2) if pool else x.new_empty(0)

    def images(height: int, width: int) -> Tensor:
        size, layout = (b, weight.shape[0], height, width), torch.channels_last
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)

    y = images(height, width)
    pooled = images(height // 2, width // 2) if pool else None
    sources, signed = _sources(x, skip), signed or signature(x, weight, bias, skip)
    convolve(sources, weight, bias, padding, y, tile, relu=True, pooled=pooled, signed=signed)
    return y, x.new_empty(0) if pooled is None else pooled


def data_gradients(
    masked: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    mask: Tensor | None,
    needed: list[bool],
    tile: Tile | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, zero where ``mask`` is not positive, and of skip; empty if not needed."""
    need_x, need_skip = needed
    c = weight.shape[1] - x.shape[1]
    grad_x = grad_skip = x.new_empty(0)
    if tile is None:
        # of what was convolved only the shape matters
        size, layout = (x.shape[0], weight.shape[1], *x.shape[2:]), torch.channels_last
        source = (
            x
            if skip is None
            else torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
        )
        grad = convolution_gradients(masked, source, weight, padding, [True, False, False])[0]
        if need_x:
            grad_x = laid_out_like(grad[:, c:], x)
            grad_x = grad_x if mask is None else mask_gradient(grad_x, None, mask, False)[0]
        if need_skip and skip is not None:
            grad_skip = torch.ops.fastunet.crop_concat_bwd(grad, skip)
        return grad_x, grad_skip
    if skip is not None and max(c, x.shape[1]) <= 64 < tile.block_n:
        # skip and x are written one after the other, each with its own channels
        tile = replace(tile, block_n=64, warps=4)
    if need_x:
        grad_x = torch.empty_like(x)
        data_gradient(masked, weight[:, c:], padding, grad_x, tile, mask)
    if need_skip and skip is not None:
        grad_skip = torch.zeros_like(skip)
        crop = centre_crop(grad_skip, x.shape[2], x.shape[3])
        data_gradient(masked, weight[:, :c], padding, crop, tile)
    return grad_x, grad_skip


def weight_gradients(
    masked: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    tile: Tile | None,
) -> Tensor:
    """The gradient of ``weight``."""
    if tile is None:
        # one after the other: no concatenation is made, and together they take no longer
        parts, first = [], 0
        for source in _sources(x, skip):
            # of the weights only the shape matters
            part = torch.empty_like(weight[:, first : first + source.shape[1]])
            first += source.shape[1]
            needed = [False, True, False]
            parts.append(convolution_gradients(masked, source, part, padding, needed)[1])
        grad = parts[0] if skip is None else torch.cat(parts, 1)
    else:
        multiprocessors = gpu(x.device).multiprocessors
        grad = weight_gradient(masked, _sources(x, skip), padding, tile, multiprocessors)
    return laid_out_like(grad, weight)


def _sources(x: Tensor, skip: Tensor | None) -> list[Tensor]:
    return [x] if skip is None else [centre_crop(skip, x.shape[2], x.shape[3]), x]


def _library_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    skip: Tensor | None,
    fused: bool,
) -> Tensor:
    source = x if skip is None else torch.ops.fastunet.crop_concat(skip, x)
    if fused:
        once, padded = [1, 1], [padding, padding]
        y = torch.cudnn_convolution_relu(source, weight, bias, once, padded, once, 1)
    else:
        y = F.conv2d(source, weight, bias, padding=padding).relu_()
    return y.contiguous(memory_format=torch.channels_last)


def _allows_tf32() -> bool:
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")
