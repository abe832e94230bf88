"""``crop_concat``: schema, who serves which device, autograd, the public function."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._check import bad_value, check_same_kind, check_tensor, describe
from .._library import LIBRARY, register_triton
from .reference import crop_concat_bwd_reference, crop_concat_reference

LIBRARY.define("crop_concat(Tensor skip, Tensor up) -> Tensor")
LIBRARY.define("crop_concat_bwd(Tensor grad, Tensor skip) -> Tensor")
for _name, _reference in (
    ("crop_concat", crop_concat_reference),
    ("crop_concat_bwd", crop_concat_bwd_reference),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunet::{_name}", _reference, lib=LIBRARY)
    register_triton(_name, "fastunet.ops.crop_concat.triton_kernels")


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    # the values are not needed; an expanded scalar would lose the layout, and the skip is
    # alive anyway as the ReLU mask of the convolution that made it
    ctx.save_for_backward(inputs[0])


def _crop_concat_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (skip,) = ctx.saved_tensors
    need_skip, need_up = ctx.needs_input_grad
    return (
        torch.ops.fastunet.crop_concat_bwd(grad, skip) if need_skip else None,
        grad[:, skip.shape[1] :] if need_up else None,
    )


def _save_sizes(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    grad, skip = inputs
    ctx.up_shape = (grad.shape[0], grad.shape[1] - skip.shape[1], *grad.shape[2:])


def _crop_concat_bwd_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, None]:
    # linear: the gradient of the gradient is a crop again, beside zeros for the half of ``up``
    return torch.ops.fastunet.crop_concat(grad_grad, grad_grad.new_zeros(ctx.up_shape)), None


def _fold_into_batch(
    operator: Any, info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor
) -> tuple[Tensor, int]:
    """Vectorised maps: another batch axis, which joins the one that is there."""
    folded = [
        (
            tensor.movedim(dim, 0)
            if dim is not None
            else tensor.expand(info.batch_size, *tensor.shape)
        )
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    out = operator(*(tensor.flatten(0, 1) for tensor in folded))
    return out.unflatten(0, folded[0].shape[:2]), 0


for _name, _save_for, _backward in (
    ("crop_concat", _save, _crop_concat_backward),
    ("crop_concat_bwd", _save_sizes, _crop_concat_bwd_backward),
):
    torch.library.register_autograd(
        f"fastunet::{_name}", _backward, setup_context=_save_for, lib=LIBRARY
    )
    torch.library.register_vmap(
        f"fastunet::{_name}",
        partial(_fold_into_batch, getattr(torch.ops.fastunet, _name)),
        lib=LIBRARY,
    )
# looked up once: at the lowest level of the figure a microsecond is measurable
_OPERATOR = torch.ops.fastunet.crop_concat.default


def crop_concat(skip: Tensor, up: Tensor) -> Tensor:
    """Put the centre of ``skip`` before ``up``; the grey "copy and crop" arrow of the figure.

    Args:
        skip: [B, C_skip, H_skip, W_skip] of any dtype, at least as high and wide as ``up``.
        up: [B, C_up, H, W] of the same dtype.
    Returns: [B, C_skip + C_up, H, W]; rows start at (H_skip - H) // 2 of ``skip``, columns at
        (W_skip - W) // 2.
    Raises: TypeError for arguments that are not tensors of one dtype; ValueError for shapes or
        devices that do not go together.
    Differentiable any number of times and under ``torch.vmap``; ``torch.func.grad`` is refused.
    Source: Ronneberger et al. 2015, figure 1.
    """
    for name, tensor in (("skip", skip), ("up", up)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            check_tensor("crop_concat", name, tensor)
            raise bad_value("crop_concat", name, "[B, C, H, W]", describe(tensor))
    if skip.dtype != up.dtype or skip.device != up.device:
        check_same_kind("crop_concat", "up", up, "skip", skip)
        # under autocast, where a concatenation takes the wider dtype
        dtype = torch.promote_types(skip.dtype, up.dtype)
        skip, up = skip.to(dtype), up.to(dtype)
    batch, _, height, width = up.shape
    skip_batch, _, skip_height, skip_width = skip.shape
    if skip_batch != batch or skip_height < height or skip_width < width:
        want = f"[{batch}, C, H >= {height}, W >= {width}] to crop to up"
        raise bad_value("crop_concat", "skip", want, describe(skip))
    return _OPERATOR(skip, up)
