"""The paper's energy: softmax cross-entropy with a weight for each pixel.

    p_k(x) = exp(a_k(x)) / sum_j exp(a_j(x))                       softmax of the logits a
    q_k(x) = c_k ((1 - s) [k = t(x)] + s / K)        target t, class weights c, smoothing s
    E(x)   = -w(x) sum_k q_k(x) log p_k(x)                           w the pixel's weight

"sum" adds the E(x); "mean" divides the sum by that of c_t(x), as PyTorch's own cross-entropy does;
"weighted_mean" by that of c_t(x) w(x). Ignored pixels count nowhere. The gradient, with g the
incoming gradient over the divisor:

    grad_a_k(x) = g w(x) (p_k(x) sum_j q_j(x) - q_k(x))

Arithmetic is float32 for float16 and bfloat16 logits; the result is rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "weighted_mean")


def weighted_cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The loss: [B, ...] for "none", otherwise a scalar."""
    exact = _widened(logits)
    loss = F.cross_entropy(
        exact,
        target.long(),
        None if class_weight is None else class_weight.to(exact.dtype),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if pixel_weight is not None:
        loss = loss * pixel_weight
    if reduction != "none":
        loss = loss.sum()
        divisor = _divisor(exact, target, pixel_weight, class_weight, ignore_index, reduction)
        loss = loss if divisor is None else loss / divisor
    return loss.to(logits.dtype)


def weighted_cross_entropy_bwd_reference(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The gradient of the logits, from a softmax taken anew."""
    exact = _widened(logits)
    classes = logits.shape[1]
    weights = exact.new_ones(classes) if class_weight is None else class_weight.to(exact.dtype)
    counts = target != ignore_index
    index = torch.where(counts, target, 0).long()

    scale = grad_loss.to(exact.dtype) * counts
    if pixel_weight is not None:
        scale = scale * pixel_weight
    divisor = _divisor(exact, target, pixel_weight, class_weight, ignore_index, reduction)
    if divisor is not None:
        scale = scale / divisor

    smooth = weights * (label_smoothing / classes)  # [K]
    peak = weights[index] * (1 - label_smoothing)  # [B, ...]
    index = index.unsqueeze(1)
    grad = torch.softmax(exact, 1).mul_(((peak + smooth.sum()) * scale).unsqueeze(1))
    # one subtraction at the target, so that K = 1 gives exactly 0
    at_target = grad.gather(1, index) - ((peak + smooth[index[:, 0]]) * scale).unsqueeze(1)
    if label_smoothing > 0:
        grad -= smooth.view(-1, *(1,) * (logits.ndim - 2)) * scale.unsqueeze(1)
    grad.scatter_(1, index, at_target)
    return grad.to(logits.dtype)


def _widened(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _divisor(
    exact: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor | None:
    """What "mean" and "weighted_mean" divide by."""
    if reduction not in ("mean", "weighted_mean"):
        return None
    counts = target != ignore_index
    share = counts.to(exact.dtype)
    if class_weight is not None:
        share = share * class_weight.to(exact.dtype)[torch.where(counts, target, 0).long()]
    if pixel_weight is not None and reduction == "weighted_mean":
        share = share * pixel_weight
    return share.sum()
