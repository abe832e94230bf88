"""``weighted_cross_entropy``: schema, who serves which device, autograd, the public function."""

from typing import Any

import torch
from torch import Tensor

from .._check import bad_type, bad_value, check_floating, check_shape, check_tensor, describe
from .._library import LIBRARY, float32, register_autocast, register_triton
from .reference import (
    REDUCTIONS,
    stores_gradient,
    weighted_cross_entropy_bwd_reference,
    weighted_cross_entropy_reference,
)

_ARGUMENTS = (
    "Tensor logits, Tensor target, Tensor? pixel_weight, Tensor? class_weight, "
    "int ignore_index, float label_smoothing"
)

LIBRARY.define(
    f"weighted_cross_entropy({_ARGUMENTS}, str reduction, bool with_gradient) "
    "-> (Tensor loss, Tensor divisor, Tensor gradient)"
)
LIBRARY.define(
    f"weighted_cross_entropy_bwd(Tensor grad_loss, Tensor divisor, {_ARGUMENTS}) -> Tensor"
)
for _name, _reference in (
    ("weighted_cross_entropy", weighted_cross_entropy_reference),
    ("weighted_cross_entropy_bwd", weighted_cross_entropy_bwd_reference),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    register_triton(_name, "fastunet.ops.weighted_cross_entropy.triton_kernels")


@torch.library.register_fake("fastunet::weighted_cross_entropy", lib=LIBRARY)
def _fake(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(target.shape if reduction == "none" else ())
    divisor = logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))
    stored = stores_gradient(logits, reduction, with_gradient)
    return loss, divisor, torch.empty_like(logits) if stored else logits.new_empty(0)


@torch.library.register_fake("fastunet::weighted_cross_entropy_bwd", lib=LIBRARY)
def _bwd_fake(grad_loss: Tensor, divisor: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, _, _ = inputs
    _, divisor, gradient = output
    ctx.mark_non_differentiable(divisor, gradient)
    # or zeros of their size would come in
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(divisor, gradient, *tensors)


def _weighted_cross_entropy_backward(
    ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    divisor, gradient, *inputs = ctx.saved_tensors
    if not (gradient.numel() and _is_plain_one(grad_loss)):
        gradient = torch.ops.fastunet.weighted_cross_entropy_bwd(
            grad_loss, divisor, *inputs, ctx.ignore_index, ctx.label_smoothing
        )
    return (gradient, *(None,) * 7)


def _is_plain_one(grad_loss: Tensor) -> bool:
    """Whether the loss was differentiated as it is, and nothing watches: no transform, no trace."""
    functorch = torch._C._functorch
    return (
        type(grad_loss) is Tensor
        and not torch.is_grad_enabled()
        and not functorch.is_functorch_wrapped_tensor(grad_loss)
        and not functorch.is_legacy_batchedtensor(grad_loss)
        and grad_loss.item() == 1.0
    )


def _differentiated_twice(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError("weighted_cross_entropy: its gradient cannot be differentiated again")


torch.library.register_autograd(
    "fastunet::weighted_cross_entropy",
    _weighted_cross_entropy_backward,
    setup_context=_save,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "fastunet::weighted_cross_entropy_bwd", _differentiated_twice, lib=LIBRARY
)
register_autocast("weighted_cross_entropy", float32)


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy in which each pixel has its weight; the paper's energy.

        E = sum over pixels x of  -w(x) log softmax(logits(x))[target(x)]

    With no pixel weights it is ``torch.nn.functional.cross_entropy`` for class-index targets.

    Args:
        logits: [B, K, H, W] (or [B, K, ...]) floating point; half types are computed in float32.
        target: [B, H, W] int64, int32 or uint8 class ids in 0..K-1, or ``ignore_index``.
        pixel_weight: [B, H, W] floating point, scales each pixel's loss; not differentiable.
        class_weight: [K] floating point, scales each class's loss; not differentiable.
        ignore_index: class id of pixels that count nowhere.
        label_smoothing: 0..1, share of the target spread evenly over the classes.
        reduction: "none"; "sum"; "mean", divided by the class weights of the pixels that count, as
            PyTorch does; or "weighted_mean", divided by class weight times pixel weight.
    Returns: a scalar of ``logits``'s dtype, or [B, H, W] for "none".
    Raises: TypeError for wrong dtypes or weights that require gradients; ValueError for shapes,
        devices or options that cannot work; on the CPU IndexError for a target out of range, which
        a GPU asserts, as PyTorch's does; RuntimeError from a second differentiation and from
        ``torch.func.grad``. ``torch.vmap`` runs it once an item.
    Source: Ronneberger et al. 2015, equation 1.
    """
    _check(logits, target, pixel_weight, class_weight, label_smoothing, reduction)
    # one pass instead of two, where the host can see in backward that no other factor came in
    with_gradient = (
        not torch.compiler.is_compiling()
        and logits.device.type == "cpu"
        and logits.requires_grad
        and torch.is_grad_enabled()
    )
    return torch.ops.fastunet.weighted_cross_entropy(
        logits,
        target,
        pixel_weight,
        class_weight,
        ignore_index,
        float(label_smoothing),
        reduction,
        with_gradient,
    )[0]


def _check(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    operator = "weighted_cross_entropy"
    check_tensor(operator, "logits", logits)
    check_floating(operator, "logits", logits)
    if logits.ndim < 2:
        raise bad_value(operator, "logits", "[B, K, H, W]", describe(logits))
    pixels = [logits.shape[0], *logits.shape[2:]]
    check_tensor(operator, "target", target)
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise bad_type(operator, "target", "int64, int32 or uint8 class ids", describe(target))
    check_shape(operator, "target", target, pixels)
    others = [("target", target)]
    for name, weight, shape in (
        ("pixel_weight", pixel_weight, pixels),
        ("class_weight", class_weight, [logits.shape[1]]),
    ):
        if weight is None:
            continue
        check_tensor(operator, name, weight)
        check_floating(operator, name, weight)
        check_shape(operator, name, weight, shape)
        if weight.requires_grad:
            raise bad_type(operator, name, "detached (it is not differentiable)", "requires_grad")
        others.append((name, weight))
    for name, tensor in others:
        if tensor.device != logits.device:
            raise bad_value(operator, name, f"on {logits.device} as logits is", tensor.device)
    if not 0.0 <= label_smoothing <= 1.0:
        raise bad_value(operator, "label_smoothing", "within 0..1", label_smoothing)
    if reduction not in REDUCTIONS:
        raise bad_value(operator, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
