"""``conv_relu`` on GPUs: each of a layer's three convolutions by our kernel or the library's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import gpu
from ..crop_concat.reference import centre_crop, uncrop
from . import tiles
from .reference import (
    conv_relu_bwd_reference,
    conv_relu_pool_reference,
    conv_relu_reference,
    convolution_gradients,
    laid_out_like,
)
from .tiles import Problem, Tile
from .triton_gradients import data_gradient, mask_gradient, weight_gradient
from .triton_kernels import convolve, why_not_tma


def unsupported(x: Tensor, weight: Tensor, skip: Tensor | None) -> str | None:
    """Why neither kernel takes a call, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{x.dtype} is not float16, bfloat16 or float32"
    if x.dtype == torch.float32 and x.is_cuda and not _allows_tf32():
        return "float32 without TF32 is the library's"
    if min(x.numel(), weight.numel()) == 0 or (skip is not None and skip.numel() == 0):
        return "there are no pixels or channels"
    images = [x, weight] if skip is None else [x, weight, skip]
    if not any(t.is_contiguous(memory_format=torch.channels_last) for t in images):
        return "the images are not in channels_last"
    return None


def conv_relu_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
) -> Tensor:
    """As ``conv_relu_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_reference(x, weight, bias, padding, skip, *flags)
    return _forward(x, weight, bias, padding, skip, pool=False)[0]


def conv_relu_pool_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, *flags: bool
) -> tuple[Tensor, Tensor]:
    """As ``conv_relu_pool_reference``."""
    if unsupported(x, weight, skip):
        return conv_relu_pool_reference(x, weight, bias, padding, skip, *flags)
    return _forward(x, weight, bias, padding, skip, pool=True)


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
    if grad_is_masked:
        masked = grad_y.contiguous(memory_format=torch.channels_last)
        grad_bias = masked.sum((0, 2, 3)) if need_bias else x.new_empty(0)
    else:
        masked, grad_bias = mask_gradient(grad_y, grad_pooled, y, need_bias)

    sources = _sources(x, skip)
    b, c_out, height, width = y.shape
    c_all = weight.shape[1]
    turned = Problem("data gradient", x.dtype, b, 0, c_out, c_all, *x.shape[2:])
    data_tile = _tile(turned, [masked, *sources], x.device)
    weight_tile = _tile(
        Problem(
            "weight gradient", x.dtype, b, c_all - x.shape[1], x.shape[1], c_out, height, width
        ),
        [masked, *sources],
        x.device,
    )
    need_data = need_x or need_skip
    grad_source, grad_weight = _library_gradients(
        masked, x, weight, skip, padding,
        need_data and data_tile is None, need_weight and weight_tile is None,
    )  # fmt: skip
    if need_weight:
        if weight_tile is not None:
            multiprocessors = gpu(x.device).multiprocessors
            grad_weight = weight_gradient(masked, sources, padding, weight_tile, multiprocessors)
        grad_weight = laid_out_like(grad_weight, weight)

    c = c_all - x.shape[1]
    mask = x if relu_made_x else None
    grad_x = grad_skip = x.new_empty(0)
    if need_x and data_tile is None:
        grad_x = laid_out_like(grad_source[:, c:], x)
        grad_x = grad_x if mask is None else mask_gradient(grad_x, None, mask, False)[0]
    elif need_x and data_tile is not None:
        grad_x = torch.empty_like(x)
        data_gradient(masked, weight[:, c:], padding, grad_x, data_tile, mask)
    if need_skip and skip is not None and data_tile is None:
        grad_skip = uncrop(grad_source[:, :c], skip)
    elif need_skip and skip is not None and data_tile is not None:
        grad_skip = torch.zeros_like(skip)
        crop = centre_crop(grad_skip, *x.shape[2:])
        data_gradient(masked, weight[:, :c], padding, crop, data_tile)
    return grad_x, grad_weight, grad_bias, grad_skip


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor]:
    b, c, height, width = x.shape
    height, width = height - 2 + 2 * padding, width - 2 + 2 * padding
    c_out, c_all = weight.shape[:2]
    problem = Problem("forward", x.dtype, b, c_all - c, c, c_out, height, width, pool)
    sources = _sources(x, skip)
    tile = _tile(problem, [*sources, weight], x.device)
    if tile is None:
        return _library_forward(x, weight, bias, padding, skip, pool)
    empty = x.new_empty(0)
    y = torch.empty(
        (b, c_out, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    pooled = torch.empty_like(y[:, :, : height // 2, : width // 2]) if pool else None
    convolve(sources, weight, bias, padding, y, tile, relu=True, pooled=pooled)
    return y, empty if pooled is None else pooled


def _sources(x: Tensor, skip: Tensor | None) -> list[Tensor]:
    return [x] if skip is None else [centre_crop(skip, *x.shape[2:]), x]


def _tile(problem: Problem, images: list[Tensor], device: torch.device) -> Tile | None:
    """The kernel for ``problem``, or None for the library's."""
    tile = tiles.choose(problem, gpu(device).capability, tiles.cached(device))
    if tile is not None and tile.kernel == "tma" and why_not_tma(*images):
        return None
    return tile


def _library_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor]:
    source = x if skip is None else torch.ops.fastunet.crop_concat(skip, x)
    y = F.conv2d(source, weight, bias, padding=padding).relu_()
    y = y.contiguous(memory_format=torch.channels_last)
    return y, F.max_pool2d(y, 2) if pool else x.new_empty(0)


def _library_gradients(
    masked: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    need_data: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the concatenated source and of the weights; empty where not needed."""
    if not (need_data or need_weight):
        return x.new_empty(0), x.new_empty(0)
    source = x if skip is None else torch.ops.fastunet.crop_concat(skip, x)
    needed = [need_data, need_weight, False]
    grad_source, grad_weight, _ = convolution_gradients(masked, source, weight, padding, needed)
    return grad_source, grad_weight


def _allows_tf32() -> bool:
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")
