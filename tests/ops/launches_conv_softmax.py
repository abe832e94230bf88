"""Launches of conv_softmax's kernel, which tests/aot.py compiles."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastunet.ops.conv_softmax.gpu import conv_argmax_triton, conv_softmax_triton

PROBABILITIES, LABELS = "to probabilities", "to labels"


def _launch(
    function: Callable[..., Tensor], channels: int, classes: int, dtype: torch.dtype, size: int
) -> None:
    x = torch.empty(2, channels, size, size, dtype=dtype, memory_format=torch.channels_last)
    weight, bias = torch.empty(classes, channels, 1, 1, dtype=dtype), torch.empty(classes)
    function(x, weight, bias.to(dtype))


# figure 1's head, more channels and classes, and images whose rows of values are not aligned
LAUNCHES: dict[str, Callable[[], None]] = {
    f"{name} {result}": partial(_launch, function, *arguments)
    for name, arguments in {
        "64 -> 2 bfloat16": (64, 2, torch.bfloat16, 388),
        "64 -> 2 float16": (64, 2, torch.float16, 388),
        "64 -> 2 float32": (64, 2, torch.float32, 388),
        "128 -> 21 bfloat16": (128, 21, torch.bfloat16, 388),
        "128 -> 21 float32": (128, 21, torch.float32, 388),
        "256 -> 128 bfloat16": (256, 128, torch.bfloat16, 388),
        "256 -> 128 float32": (256, 128, torch.float32, 388),
        "33 -> 3 bfloat16, odd": (33, 3, torch.bfloat16, 387),
        "33 -> 3 float32, odd": (33, 3, torch.float32, 387),
    }.items()
    for result, function in ((PROBABILITIES, conv_softmax_triton), (LABELS, conv_argmax_triton))
}
