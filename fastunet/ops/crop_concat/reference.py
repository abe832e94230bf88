"""Copy and crop: the skip connection's centre beside the up-sampled features.

    out = [skip[:, :, i0 : i0 + H, j0 : j0 + W], up]
    i0 = (H_skip - H) // 2, j0 = (W_skip - W) // 2

The gradient of ``up`` is a slice of the incoming one; that of ``skip`` is the other slice, laid
into zeros.
"""

import torch
from torch import Tensor


def centre_crop(skip: Tensor, height: int, width: int) -> Tensor:
    """The central ``height`` x ``width`` view of ``skip``."""
    top, left = (skip.shape[2] - height) // 2, (skip.shape[3] - width) // 2
    return skip[:, :, top : top + height, left : left + width]


def crop_concat_reference(skip: Tensor, up: Tensor) -> Tensor:
    """Concatenate the centre of ``skip`` and ``up``; [B, C_skip + C_up, H, W]."""
    return torch.cat([centre_crop(skip, up.shape[2], up.shape[3]), up], 1)


def crop_concat_bwd_reference(grad: Tensor, skip: Tensor) -> Tensor:
    """The gradient of ``skip``, of which only the shape and layout are read."""
    return uncrop(grad[:, : skip.shape[1]], skip)


def uncrop(centre: Tensor, like: Tensor) -> Tensor:
    """Zeros shaped as ``like`` with ``centre`` in their middle."""
    full = torch.zeros_like(like)
    centre_crop(full, centre.shape[2], centre.shape[3]).copy_(centre)
    return full
