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
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, [B, ...] for "none" and otherwise a scalar, and what backward needs of it.

    Returns: the loss; what its sum was divided by; the gradient of the logits for an incoming
        gradient of 1 if that was asked for and ``stores_gradient``, else [0].
    """
    exact = _widened(logits)
    # without pixel weights the sum needs no loss a pixel; a GPU's own sum is not deterministic
    summed = pixel_weight is None and reduction != "none" and not logits.is_cuda
    loss = F.cross_entropy(
        exact,
        target.long(),
        None if class_weight is None else class_weight.to(exact.dtype),
        ignore_index=ignore_index,
        reduction="sum" if summed else "none",
        label_smoothing=label_smoothing,
    )
    if pixel_weight is not None:
        loss = loss * pixel_weight
    if reduction != "none" and not summed:
        loss = loss.sum()
    divisor = exact.new_ones(())
    if reduction in ("mean", "weighted_mean"):
        share = (target != ignore_index).to(exact.dtype)
        if class_weight is not None:
            share = share * class_weight.to(exact.dtype)[_index(target, logits)]
        if pixel_weight is not None and reduction == "weighted_mean":
            share = share * pixel_weight
        divisor = share.sum()
        loss = loss / divisor
    if stores_gradient(logits, reduction, with_gradient):
        gradient = weighted_cross_entropy_bwd_reference(
            exact.new_ones(()),
            divisor,
            logits,
            target,
            pixel_weight,
            class_weight,
            ignore_index,
            label_smoothing,
        )
    else:
        gradient = logits.new_empty(0)
    return loss.to(logits.dtype), divisor, gradient


def stores_gradient(logits: Tensor, reduction: str, with_gradient: bool) -> bool:
    """Whether forward gives the gradient too: one of float16 could underflow until it is scaled."""
    wide = logits.dtype in (torch.float32, torch.float64)
    return with_gradient and wide and reduction != "none"


def weighted_cross_entropy_bwd_reference(
    grad_loss: Tensor,
    divisor: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of the logits, from a softmax taken anew."""
    exact = _widened(logits)
    classes = logits.shape[1]
    index = _index(target, logits)
    scale = grad_loss.to(exact.dtype) / divisor
    if pixel_weight is not None:
        scale = scale * pixel_weight
    scale = scale * (target != ignore_index)

    # q is `smooth` at every class, and `peak` more at the target
    peak: Tensor | float = 1 - label_smoothing
    smooth = exact.new_full((classes,), label_smoothing / classes)
    if class_weight is not None:
        weights = class_weight.to(exact.dtype)
        peak, smooth = weights[index] * peak, weights * smooth
    grad = torch.softmax(exact, 1).mul_(((peak + smooth.sum()) * scale).unsqueeze(1))
    # one subtraction at the target, so that K = 1 gives exactly 0
    at_target = peak + smooth[index] if label_smoothing > 0 else peak
    index = index.unsqueeze(1)
    target_grad = grad.gather(1, index) - (at_target * scale).unsqueeze(1)
    if label_smoothing > 0:
        grad -= smooth.view(-1, *(1,) * (logits.ndim - 2)) * scale.unsqueeze(1)
    return torch.empty_like(logits).copy_(grad.scatter_(1, index, target_grad))


def _widened(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _index(target: Tensor, logits: Tensor) -> Tensor:
    """The target as an index that is in range where a pixel is ignored."""
    return target.long().clamp(0, logits.shape[1] - 1)
