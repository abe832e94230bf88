"""The loss and its gradient on a GPU: one pass over the logits forward, one backward.

Backward takes the softmax anew. For float32 logits, int64 targets and float32 weights that moves
4K + 12 bytes a pixel forward and 8K + 12 backward, 12K + 24 together; a gradient stored by forward
and scaled by backward 16K + 12, no less from K = 3 on. With two classes it would be 44 bytes
instead of 48, for twice the memory, and in float16 it underflows before it is scaled.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import (
    stores_gradient,
    weighted_cross_entropy_bwd_reference,
    weighted_cross_entropy_reference,
)

# so many classes stay in registers; more are looked at in steps of so many logits a thread
_MOST_CLASSES = 8
_LOGITS_A_STEP = 16
_WARPS = 4
# of logits, a thread loads
_VECTOR_BYTES = 16
_TOTAL_BLOCK = 1024


@triton.jit
def _load_logits(
    logits_ptr, k, p, inside, stride_k, PIXEL_STRIDE: tl.constexpr, CLASSES: tl.constexpr
):
    """[BLOCK_K, BLOCK_P] in float32; classes that are none have logits of -inf."""
    offsets = k.to(tl.int64)[:, None] * stride_k + p[None, :] * PIXEL_STRIDE
    mask = (k < CLASSES)[:, None] & inside[None, :]
    return tl.load(logits_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _load_smooth(class_weight_ptr, k, label_smoothing, CLASSES: tl.constexpr):
    """[BLOCK_K], what label smoothing asks of each class."""
    weight = tl.where(k < CLASSES, 1.0, 0.0)
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + k, mask=k < CLASSES, other=0.0).to(tl.float32)
    return weight * (label_smoothing / CLASSES)


@triton.jit
def _load_target(target_ptr, at, inside, ignore_index, CLASSES: tl.constexpr):
    """The class of each pixel, and whether it counts."""
    target = tl.load(target_ptr + at, mask=inside, other=0).to(tl.int64)
    counts = inside & (target != ignore_index)
    known = (target >= 0) & (target < CLASSES)
    tl.device_assert(known, "weighted_cross_entropy: target is out of bounds", mask=counts)
    return tl.where(counts & known, target, 0).to(tl.int32), counts


@triton.jit
def _load_weight(weight_ptr, at, inside):
    """[BLOCK_P] in float32; 1 where there are no weights."""
    weight = tl.where(inside, 1.0, 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _finite(greatest):
    """What logits can be compared with, even if all of them are -inf."""
    return tl.where(greatest == float("-inf"), 0.0, greatest)


@triton.jit
def _statistics(
    logits_ptr, class_weight_ptr, target, p, inside, stride_k, label_smoothing,
    CLASSES: tl.constexpr, PIXEL_STRIDE: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each pixel: the greatest logit, the sum of exp(logit - greatest), the target's logit.

    And sum smooth_k and sum smooth_k (greatest - logit_k). NaN is in no maximum, but in the sum.
    What was summed is rescaled where a later tile of classes has a greater logit.
    """
    greatest = tl.full(p.shape, float("-inf"), tl.float32)
    total = tl.zeros(p.shape, tl.float32)
    at_target = tl.zeros(p.shape, tl.float32)
    spread = tl.zeros(p.shape, tl.float32)
    smooth_sum = 0.0
    for first in range(0, CLASSES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = _load_logits(logits_ptr, k, p, inside, stride_k, PIXEL_STRIDE, CLASSES)
        before = greatest
        greatest = tl.maximum(greatest, tl.max(x, axis=0))
        now = _finite(greatest)
        # before the first finite logit there is nothing to rescale
        before = tl.where(before == float("-inf"), now, before)
        total = total * tl.exp(before - now) + tl.sum(tl.exp(x - now[None, :]), axis=0)
        at_target += tl.sum(tl.where(k[:, None] == target[None, :], x, 0.0), axis=0)
        if SMOOTHED:
            smooth = _load_smooth(class_weight_ptr, k, label_smoothing, CLASSES)
            below = tl.where((k < CLASSES)[:, None], now[None, :] - x, 0.0)
            spread += smooth_sum * (now - before) + tl.sum(smooth[:, None] * below, axis=0)
            smooth_sum += tl.sum(smooth, axis=0)
    return _finite(greatest), total, at_target, spread, smooth_sum


@triton.jit
def _weighted_cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, pixel_weight_ptr, class_weight_ptr, loss_ptr, partials_ptr,
    pixels, blocks, stride_b, stride_k, ignore_index, label_smoothing,
    CLASSES: tl.constexpr, PIXEL_STRIDE: tl.constexpr, SMOOTHED: tl.constexpr, PIXELS_IN_DIVISOR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: the losses of BLOCK_P pixels of an image, or their sum and the divisor's.

    Reads each logit, target and weight once: 4K + 12 bytes a pixel of float32 logits, int64
    targets and float32 weights.
    """
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    p = (program % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < pixels
    at = b * pixels + p
    target, counts = _load_target(target_ptr, at, inside, ignore_index, CLASSES)
    greatest, total, at_target, spread, smooth_sum = _statistics(
        logits_ptr + b * stride_b, class_weight_ptr, target, p, inside, stride_k, label_smoothing,
        CLASSES, PIXEL_STRIDE, SMOOTHED, BLOCK_K,
    )  # fmt: skip
    log_total = tl.log(total)
    of_class = _load_weight(class_weight_ptr, target, inside)
    weight = _load_weight(pixel_weight_ptr, at, inside)
    loss = of_class * ((greatest - at_target) + log_total)
    if SMOOTHED:
        loss = (1.0 - label_smoothing) * loss + (smooth_sum * log_total + spread)
    loss = tl.where(counts, weight * loss, 0.0)
    if partials_ptr is None:
        tl.store(loss_ptr + at, loss, mask=inside)
    else:
        if PIXELS_IN_DIVISOR:
            of_class *= weight
        tl.store(partials_ptr + 2 * program, tl.sum(loss, axis=0))
        tl.store(partials_ptr + 2 * program + 1, tl.sum(tl.where(counts, of_class, 0.0), axis=0))


@triton.jit
def _weighted_cross_entropy_total_kernel(
    partials_ptr, loss_ptr, divisor_ptr, blocks, DIVIDED: tl.constexpr, BLOCK: tl.constexpr
):
    """The only program: the partial sums in a fixed order, in float64."""
    loss = tl.zeros((BLOCK,), tl.float64)
    divisor = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        i = first + tl.arange(0, BLOCK)
        loss += tl.load(partials_ptr + 2 * i, mask=i < blocks, other=0.0)
        divisor += tl.load(partials_ptr + 2 * i + 1, mask=i < blocks, other=0.0)
    over = tl.full((), 1.0, tl.float64)
    if DIVIDED:
        over = tl.sum(divisor, axis=0).to(tl.float32).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(loss, axis=0) / over).to(tl.float32))
    tl.store(divisor_ptr, over.to(tl.float32))


@triton.jit
def _weighted_cross_entropy_bwd_kernel(
    grad_loss_ptr, divisor_ptr, logits_ptr, target_ptr, pixel_weight_ptr, class_weight_ptr, grad_logits_ptr,
    pixels, blocks, stride_b, stride_k, grad_stride_b, grad_stride_k, ignore_index, label_smoothing,
    CLASSES: tl.constexpr, PIXEL_STRIDE: tl.constexpr, GRAD_PIXEL_STRIDE: tl.constexpr, SMOOTHED: tl.constexpr,
    REDUCED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_P pixels' logits.

    Reads each logit, target and weight once and writes each gradient once: 8K + 12 bytes a pixel
    as above. With more than BLOCK_K classes it reads the logits again, the last ones from a cache.
    """
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    p = (program % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < pixels
    at = b * pixels + p
    logits_ptr += b * stride_b
    grad_logits_ptr += b * grad_stride_b
    target, counts = _load_target(target_ptr, at, inside, ignore_index, CLASSES)
    greatest, total, _, _, smooth_sum = _statistics(
        logits_ptr, class_weight_ptr, target, p, inside, stride_k, label_smoothing,
        CLASSES, PIXEL_STRIDE, SMOOTHED, BLOCK_K,
    )  # fmt: skip
    if REDUCED:
        incoming = tl.load(grad_loss_ptr).to(tl.float32) / tl.load(divisor_ptr)
    else:
        incoming = tl.load(grad_loss_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where(counts, incoming, 0.0) * _load_weight(pixel_weight_ptr, at, inside)
    peak = _load_weight(class_weight_ptr, target, inside)
    if SMOOTHED:
        peak *= 1.0 - label_smoothing
    for first in range(0, CLASSES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = _load_logits(logits_ptr, k, p, inside, stride_k, PIXEL_STRIDE, CLASSES)
        share = tl.exp(x - greatest[None, :]) / total[None, :]
        # with one class both are the same sums, which cancel to exactly 0
        wanted = tl.where(k[:, None] == target[None, :], peak[None, :], 0.0)
        whole = peak
        if SMOOTHED:
            wanted += _load_smooth(class_weight_ptr, k, label_smoothing, CLASSES)[:, None]
            whole += smooth_sum
        grad = scale[None, :] * (share * whole[None, :] - wanted)
        offsets = k.to(tl.int64)[:, None] * grad_stride_k + p[None, :] * GRAD_PIXEL_STRIDE
        tl.store(grad_logits_ptr + offsets, grad, mask=(k < CLASSES)[:, None] & inside[None, :])


def weighted_cross_entropy_triton(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``weighted_cross_entropy_reference`` by two kernels: partial sums, and their sum."""
    arguments = (logits, target, pixel_weight, class_weight, ignore_index, label_smoothing)
    if unsupported(logits) is not None:
        return weighted_cross_entropy_reference(*arguments, reduction, with_gradient)
    rows, target = _as_rows(logits), target.contiguous()
    reduced = reduction != "none"
    loss = logits.new_empty(() if reduced else target.shape)
    divisor = torch.ones((), dtype=torch.float32, device=logits.device)
    programs, options = _launch(rows, target, label_smoothing)
    partials = divisor.new_empty(programs, 2) if reduced else None
    weights = (_contiguous(pixel_weight), _contiguous(class_weight))
    with torch.cuda.device_of(logits):
        _weighted_cross_entropy_fwd_kernel[(programs,)](
            rows.tensor, target, *weights, loss, partials,
            stride_b=rows.stride_b, stride_k=rows.stride_k, ignore_index=ignore_index,
            PIXEL_STRIDE=rows.pixel_stride, PIXELS_IN_DIVISOR=reduction == "weighted_mean", **options,
        )  # fmt: skip
        if partials is not None:
            _weighted_cross_entropy_total_kernel[(1,)](
                partials, loss, divisor, programs, DIVIDED=reduction != "sum", BLOCK=_TOTAL_BLOCK,
            )  # fmt: skip
    gradient = logits.new_empty(0)
    if stores_gradient(logits, reduction, with_gradient):
        gradient = weighted_cross_entropy_bwd_triton(torch.ones_like(loss), divisor, *arguments)
    return loss, divisor, gradient


def weighted_cross_entropy_bwd_triton(
    grad_loss: Tensor,
    divisor: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """``weighted_cross_entropy_bwd_reference`` by one kernel."""
    if unsupported(logits) is not None:
        return weighted_cross_entropy_bwd_reference(
            grad_loss, divisor, logits, target, pixel_weight, class_weight, ignore_index,
            label_smoothing,
        )  # fmt: skip
    rows, target = _as_rows(logits), target.contiguous()
    grad_logits = torch.empty_like(logits)
    grad_rows = _as_rows(grad_logits)
    programs, options = _launch(rows, target, label_smoothing)
    weights = (_contiguous(pixel_weight), _contiguous(class_weight))
    # a number, expanded or not
    is_one = not any(grad_loss.stride())
    with torch.cuda.device_of(logits):
        _weighted_cross_entropy_bwd_kernel[(programs,)](
            grad_loss if is_one else grad_loss.contiguous(), divisor, rows.tensor, target, *weights, grad_rows.tensor,
            stride_b=rows.stride_b, stride_k=rows.stride_k,
            grad_stride_b=grad_rows.stride_b, grad_stride_k=grad_rows.stride_k,
            ignore_index=ignore_index, PIXEL_STRIDE=rows.pixel_stride,
            GRAD_PIXEL_STRIDE=grad_rows.pixel_stride, REDUCED=is_one, **options,
        )  # fmt: skip
    if grad_rows.tensor is not grad_logits:
        grad_logits.copy_(grad_rows.tensor)
    return grad_logits


def unsupported(logits: Tensor) -> str | None:
    """Why the reference serves these logits, or None."""
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel computes in {logits.dtype}"
    if logits.numel() == 0:
        return "there is nothing to compute"
    return None


@dataclass(frozen=True)
class _Rows:
    """Logits in which the pixels of an image lie at one distance from each other."""

    tensor: Tensor
    stride_b: int
    stride_k: int
    pixel_stride: int


def _as_rows(logits: Tensor) -> _Rows:
    """The logits themselves if they lie so, as in NCHW and channels_last, or a copy."""
    pixels, pixel_stride = 1, 1
    for size, stride in zip(reversed(logits.shape[2:]), reversed(logits.stride()[2:]), strict=True):
        if size > 1:
            pixel_stride = stride if pixels == 1 else pixel_stride
            if stride != pixels * pixel_stride:
                return _as_rows(logits.contiguous())
            pixels *= size
    return _Rows(logits, logits.stride(0), logits.stride(1), pixel_stride)


def _launch(rows: _Rows, target: Tensor, label_smoothing: float) -> tuple[int, dict[str, Any]]:
    """How many programs, and what both kernels are told."""
    images, classes = rows.tensor.shape[:2]
    pixels = target.numel() // images
    vector = _VECTOR_BYTES // rows.tensor.element_size()
    block_p = _WARPS * 32 * vector
    blocks = triton.cdiv(pixels, block_p)
    in_registers = classes <= _MOST_CLASSES
    options = {
        "pixels": pixels,
        "blocks": blocks,
        "label_smoothing": label_smoothing,
        "CLASSES": classes,
        "SMOOTHED": label_smoothing > 0,
        "BLOCK_K": triton.next_power_of_2(classes) if in_registers else _LOGITS_A_STEP // vector,
        "BLOCK_P": block_p,
        "num_warps": _WARPS,
        # device_assert, and not the checks of every sum that come with it
        "debug": True,
        "sanitize_overflow": False,
    }
    return images * blocks, options


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()
