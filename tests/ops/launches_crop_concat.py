"""What tests/aot.py compiles of crop_concat: figure 1's levels, and accesses of other widths."""

from collections.abc import Callable

import torch

from fastunet.ops.crop_concat.triton_kernels import crop_concat_bwd_triton, crop_concat_triton

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def _launch(
    layout: torch.memory_format,
    dtype: torch.dtype,
    channels: int,
    skip_size: int,
    size: int,
    first: int = 0,
) -> Callable[[], None]:
    """A launch on channels from ``first`` on of larger tensors."""

    def launch() -> None:
        skip, up = (
            torch.empty((1, first + channels, n, n), dtype=dtype, memory_format=layout)[:, first:]
            for n in (skip_size, size)
        )
        crop_concat_bwd_triton(crop_concat_triton(skip, up), skip)

    return launch


# by the bytes of an access and what decides them
LAUNCHES = {
    "16, NCHW float32 at 56": _launch(NCHW, torch.float32, 512, 64, 56),
    "16, NCHW bfloat16 at 104": _launch(NCHW, torch.bfloat16, 256, 136, 104),
    "16, NCHW float32 at 200": _launch(NCHW, torch.float32, 128, 280, 200),
    "16, NCHW bfloat16 at 392": _launch(NCHW, torch.bfloat16, 64, 568, 392),
    "16, NHWC bfloat16 at 56": _launch(NHWC, torch.bfloat16, 512, 64, 56),
    "16, NHWC float32 at 104": _launch(NHWC, torch.float32, 256, 136, 104),
    "16, NHWC bfloat16 at 200": _launch(NHWC, torch.bfloat16, 128, 280, 200),
    "16, NHWC float32 at 392": _launch(NHWC, torch.float32, 64, 568, 392),
    "8, NCHW bfloat16 at 56, whose left margin is 4 pixels": _launch(
        NCHW, torch.bfloat16, 512, 64, 56
    ),
    "4, NHWC float32 of 3 channels": _launch(NHWC, torch.float32, 3, 9, 7),
    "4, NHWC float32 that begins 4 bytes too late": _launch(NHWC, torch.float32, 63, 9, 7, first=1),
    "4, a pixel": _launch(NCHW, torch.float32, 1, 1, 1),
    "1, NCHW bool at 7": _launch(NCHW, torch.bool, 2, 9, 7),
}
