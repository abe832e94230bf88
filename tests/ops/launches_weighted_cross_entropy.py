"""Launches of weighted_cross_entropy's kernels, which tests/aot.py compiles."""

from collections.abc import Callable
from functools import partial

import torch

from fastunet.ops.weighted_cross_entropy.triton_kernels import (
    weighted_cross_entropy_bwd_triton,
    weighted_cross_entropy_triton,
)


def _launch(
    classes: int,
    dtype: torch.dtype,
    size: int = 388,
    *,
    layout: torch.memory_format = torch.contiguous_format,
    ids: torch.dtype = torch.int64,
    class_weight: bool = False,
    smoothing: float = 0.0,
    reduction: str = "mean",
) -> None:
    logits = torch.empty(2, classes, size, size, dtype=dtype).to(memory_format=layout)
    target = torch.empty(2, size, size, dtype=ids)
    weights = (
        torch.empty(2, size, size),
        torch.empty(classes) if class_weight else None,
    )
    loss, divisor, _ = weighted_cross_entropy_triton(
        logits, target, *weights, -100, smoothing, reduction, False
    )
    weighted_cross_entropy_bwd_triton(loss, divisor, logits, target, *weights, -100, smoothing)


LAUNCHES: dict[str, Callable[[], None]] = {
    **{
        f"{classes} classes, {str(dtype).removeprefix('torch.')}": partial(_launch, classes, dtype)
        for classes in (1, 2, 3, 5, 8, 16, 64, 256)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "2 classes, float16": partial(_launch, 2, torch.float16),
    "2 classes, channels_last": partial(_launch, 2, torch.float32, layout=torch.channels_last),
    "8 classes, channels_last": partial(_launch, 8, torch.bfloat16, layout=torch.channels_last),
    "2 classes, odd size": partial(_launch, 2, torch.float32, 387),
    "2 classes, uint8": partial(_launch, 2, torch.bfloat16, ids=torch.uint8),
    "2 classes, none": partial(_launch, 2, torch.float32, reduction="none"),
    "everything": partial(
        _launch, 2, torch.float32, class_weight=True, smoothing=0.1, reduction="weighted_mean"
    ),
    "everything, 64 classes": partial(
        _launch, 64, torch.bfloat16, class_weight=True, smoothing=0.1, reduction="weighted_mean"
    ),
}
