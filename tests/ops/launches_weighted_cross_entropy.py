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
    reduction: str = "mean",
    everything: bool = False,
) -> None:
    """Figure 1's output, int64 targets and pixel weights; class weights and smoothing as well."""
    logits = torch.empty(2, classes, size, size, dtype=dtype).to(memory_format=layout)
    arguments = (
        torch.empty(2, size, size, dtype=torch.int64),
        torch.empty(2, size, size),
        torch.empty(classes) if everything else None,
        -100,
        0.1 if everything else 0.0,
    )
    loss, divisor, _ = weighted_cross_entropy_triton(logits, *arguments, reduction, False)
    weighted_cross_entropy_bwd_triton(loss, divisor, logits, *arguments)


LAUNCHES: dict[str, Callable[[], None]] = {
    "1 float32": partial(_launch, 1, torch.float32),
    "2 float32": partial(_launch, 2, torch.float32),
    "2 float16": partial(_launch, 2, torch.float16),
    "3 bfloat16": partial(_launch, 3, torch.bfloat16),
    "8 bfloat16": partial(_launch, 8, torch.bfloat16),
    "64 float32": partial(_launch, 64, torch.float32),
    "256 bfloat16": partial(_launch, 256, torch.bfloat16),
    "channels_last": partial(_launch, 2, torch.float32, layout=torch.channels_last),
    "odd size": partial(_launch, 2, torch.float32, 387),
    "none": partial(_launch, 2, torch.float32, reduction="none"),
    "everything, 2": partial(_launch, 2, torch.float32, everything=True),
    "everything, 64": partial(_launch, 64, torch.bfloat16, everything=True),
}
