"""crop_concat copies, so every comparison is exact."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.ops import eager

# (B, C_skip, C_up, H, W, rows cropped, columns cropped)
SHAPES = [
    (1, 64, 64, 56, 56, 8, 8),
    (2, 3, 5, 7, 9, 3, 0),
    (1, 1, 1, 1, 1, 0, 0),
    (0, 2, 2, 4, 4, 2, 2),
    (2, 0, 2, 4, 4, 1, 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    b, c_skip, c_up, h, w, rows, columns = shape
    skip = torch.randint(-9, 9, (b, c_skip, h + rows, w + columns), device=device)
    up = torch.randint(-9, 9, (b, c_up, h, w), device=device)
    return skip.to(dtype), up.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    skip, up = inputs(shape, dtype, device)
    h, w, rows, columns = shape[3:]
    top, left = rows // 2, columns // 2
    want = torch.cat([skip[:, :, top : top + h, left : left + w], up], 1)
    assert torch.equal(fastunet.crop_concat(skip, up), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, ...], device: torch.device) -> None:
    skip, up = (t.requires_grad_() for t in inputs(shape, torch.float64, device))
    out = fastunet.crop_concat(skip, up)
    incoming = torch.randn_like(out)
    got = torch.autograd.grad(out, (skip, up), incoming)
    want = torch.autograd.grad(eager.crop_concat(skip, up), (skip, up), incoming)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if 0 < out.numel() < 1000:
        assert torch.autograd.gradcheck(fastunet.crop_concat, (skip[:, :2], up[:, :2]))


def test_strides(device: torch.device) -> None:
    skip, up = inputs(SHAPES[1], torch.float32, device)
    want = fastunet.crop_concat(skip, up)
    last = [t.to(memory_format=torch.channels_last) for t in (skip, up)]
    out = fastunet.crop_concat(*last)
    assert torch.equal(out, want)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fastunet.crop_concat(skip.mT.contiguous().mT, up), want)
    assert torch.equal(fastunet.crop_concat(torch.stack([skip, skip], 2)[:, :, 1], up), want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_registration(layout: torch.memory_format, device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    skip, up = (
        t.to(memory_format=layout).requires_grad_()
        for t in inputs(SHAPES[1], torch.float32, device)
    )
    torch.library.opcheck(torch.ops.fastunet.crop_concat, (skip, up))
    compiled = torch.compile(fastunet.crop_concat, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(skip, up), fastunet.crop_concat(skip, up))


def test_autocast() -> None:
    skip, up = inputs(SHAPES[1], torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert fastunet.crop_concat(skip, up.bfloat16()).dtype == torch.float32
        assert fastunet.crop_concat(skip.bfloat16(), up.bfloat16()).dtype == torch.bfloat16


def test_rejects() -> None:
    skip, up = torch.ones(1, 2, 8, 8), torch.ones(1, 3, 6, 6)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (None, up, TypeError, "crop_concat: skip must be a torch.Tensor, got NoneType"),
        (skip[0], up, ValueError, r"skip must be \[B, C, H, W\], got \[2, 8, 8\] float32"),
        (skip, up.double(), TypeError, "up must be torch.float32 as skip is, got torch.float64"),
        (up[:, :, :5], up, ValueError, r"skip must be \[1, C, H >= 6, W >= 6\] to crop to up"),
        (torch.cat([skip, skip]), up, ValueError, r"skip must be \[1, C, "),
        (skip, up.to("meta"), ValueError, "up must be on cpu as skip is, got meta"),
    ]
    for bad_skip, bad_up, error, message in cases:
        with pytest.raises(error, match=message):
            fastunet.crop_concat(bad_skip, bad_up)


def test_check_can_fail() -> None:
    skip, up = inputs(SHAPES[0], torch.float32, "cpu")
    off_by_one = torch.cat([skip[:, :, 5:61, 4:60], up], 1)
    assert not torch.equal(fastunet.crop_concat(skip, up), off_by_one)
