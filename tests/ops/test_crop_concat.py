"""crop_concat copies, so every comparison is exact, and so is the layout."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.ops import eager
from fastunet.ops.crop_concat.reference import crop_concat_bwd_reference, crop_concat_reference

# (B, C_skip, C_up, H, W, rows cropped, columns cropped)
SHAPES = [
    (1, 64, 64, 56, 56, 8, 8),
    # more than a thread's worth, and threads whose shares are not whole planes
    (2, 7, 3, 60, 61, 5, 4),
    (2, 3, 5, 7, 9, 3, 0),
    (1, 1, 1, 1, 1, 0, 0),
    (2, 1, 1, 3, 1, 1, 2),
    (0, 2, 2, 4, 4, 2, 2),
    (2, 0, 2, 4, 4, 1, 1),
    (2, 2, 0, 4, 4, 1, 1),
    (1, 2, 2, 0, 4, 3, 1),
]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.int64,
]
# the same values, elsewhere in memory
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch inside": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "rows of a larger buffer": lambda t: torch.cat([t, t], 3)[..., t.shape[3] :],
    "channels of a larger buffer": lambda t: torch.cat([t, t], 1)
    .contiguous(memory_format=torch.channels_last)[:, t.shape[1] :],
    "every second": lambda t: torch.stack([t, t], 4)[..., 1],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}  # fmt: skip

Operator = Callable[[Tensor, Tensor], Tensor]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    b, c_skip, c_up, h, w, rows, columns = shape
    skip = torch.randint(-9, 9, (b, c_skip, h + rows, w + columns), device=device)
    up = torch.randint(-9, 9, (b, c_up, h, w), device=device)
    return skip.to(dtype), up.to(dtype)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal values in the same layout."""
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


def check_forward(operator: Operator, skip: Tensor, up: Tensor) -> None:
    assert_same(operator(skip, up), crop_concat_reference(skip, up))


def check_backward(operator: Operator, grad: Tensor, skip: Tensor) -> None:
    assert_same(operator(grad, skip), crop_concat_bwd_reference(grad, skip))


def mixtures(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A skip, what goes beside it and a gradient, in each pair of layouts."""
    skip, up = inputs((2, 3, 5, 7, 6, 3, 2), dtype, device)
    grad = torch.randint(-9, 9, (2, 8, 7, 6), device=device).to(dtype)
    for of_skip in LAYOUTS.values():
        for of_other in LAYOUTS.values():
            yield of_skip(skip), of_other(up), of_other(grad)
    # one value for all channels, or for everything
    yield skip[:, :1].expand_as(skip), up[:, :1].expand_as(up), grad[:1, :1].expand_as(grad)
    yield skip, up, torch.ones((), dtype=dtype, device=device).expand_as(grad)


def far_apart(device: torch.device) -> tuple[Tensor, Tensor]:
    """A skip whose last channel begins 2^31 elements after its first, with nothing between."""
    # deterministic mode would fill all of it
    torch.use_deterministic_algorithms(False)
    memory = torch.empty(2**31 + 64, dtype=torch.uint8, device=device)
    skip = memory.as_strided((1, 3, 4, 8), (0, 2**30, 8, 1))
    skip.copy_(torch.arange(96, device=device).view(skip.shape))
    return skip, skip[:, :, 1:3, 2:6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    skip, up = inputs(shape, dtype, device)
    h, w, rows, columns = shape[3:]
    top, left = rows // 2, columns // 2
    want = torch.cat([skip[:, :, top : top + h, left : left + w], up], 1)
    assert_same(fastunet.crop_concat(skip, up), want)
    for layout in ("channels_last", "unaligned"):
        check_forward(fastunet.crop_concat, *map(LAYOUTS[layout], (skip, up)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(
    shape: tuple[int, ...], layout: torch.memory_format, device: torch.device
) -> None:
    skip, up = (
        t.to(memory_format=layout).requires_grad_() for t in inputs(shape, torch.float64, device)
    )
    out = fastunet.crop_concat(skip, up)
    incoming = torch.randn_like(out)
    got = torch.autograd.grad(out, (skip, up), incoming)
    want = torch.autograd.grad(eager.crop_concat(skip, up), (skip, up), incoming)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if min(shape[:5]) > 0 and out.numel() < 1000:
        assert torch.autograd.gradcheck(fastunet.crop_concat, (skip[:, :2], up[:, :2]))
        assert torch.autograd.gradgradcheck(fastunet.crop_concat, (skip[:, :2], up[:, :2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex128])
def test_strides(dtype: torch.dtype, device: torch.device) -> None:
    for skip, up, grad in mixtures(device, dtype):
        check_forward(fastunet.crop_concat, skip, up)
        check_backward(torch.ops.fastunet.crop_concat_bwd, grad, skip)


def test_far_apart(device: torch.device) -> None:
    check_forward(fastunet.crop_concat, *far_apart(device))


def test_conjugated(device: torch.device) -> None:
    skip, up = (t + 1j for t in inputs(SHAPES[2], torch.complex64, device))
    want = eager.crop_concat(skip.conj().resolve_conj(), up)
    assert torch.equal(fastunet.crop_concat(skip.conj(), up), want)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second"])
def test_registration(layout: str, device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    skip, up = (
        LAYOUTS[layout](t).requires_grad_() for t in inputs(SHAPES[2], torch.float32, device)
    )
    torch.library.opcheck(torch.ops.fastunet.crop_concat, (skip, up))
    out = fastunet.crop_concat(skip, up)
    torch.library.opcheck(torch.ops.fastunet.crop_concat_bwd, (out.detach(), skip.detach()))
    compiled = torch.compile(fastunet.crop_concat, fullgraph=True, backend="aot_eager")
    assert_same(compiled(skip, up), out)


def test_vmap(device: torch.device) -> None:
    skip, up = (torch.stack([t, t + 1], 4) for t in inputs(SHAPES[2], torch.float64, device))
    for in_dims in ((4, 4), (4, None), (None, 4)):
        one, other = (t if dim else t[..., 0] for t, dim in zip((skip, up), in_dims, strict=True))
        got, want = (
            torch.vmap(module.crop_concat, in_dims)(one, other) for module in (fastunet, eager)
        )
        assert torch.equal(got, want)
    skip = skip[..., 0].requires_grad_()
    out = fastunet.crop_concat(skip, up[..., 0])
    several = torch.randn(3, *out.shape, device=device, dtype=out.dtype)
    (grads,) = torch.autograd.grad(out, skip, several, is_grads_batched=True)
    want = torch.stack([crop_concat_bwd_reference(one, skip) for one in several])
    assert torch.equal(grads, want)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda t: fastunet.crop_concat(t, up[..., 0]).sum())(skip)


def test_autocast(device: torch.device) -> None:
    skip, up = inputs(SHAPES[2], torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        for one, other, want in (
            (skip, up.bfloat16(), torch.float32),
            (skip.bfloat16(), up.bfloat16(), torch.bfloat16),
            (skip, up.double(), torch.float64),
        ):
            assert fastunet.crop_concat(one, other).dtype == want
            check_forward(fastunet.crop_concat, one, other)


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
    """Each of these wrong operators is found."""

    def off_by_one(skip: Tensor, up: Tensor) -> Tensor:
        return crop_concat_reference(skip.roll(1, 3), up)

    def wrong_order(skip: Tensor, up: Tensor) -> Tensor:
        return crop_concat_reference(up, skip[:, :, 4:-4, 4:-4])

    def wrong_layout(skip: Tensor, up: Tensor) -> Tensor:
        return crop_concat_reference(skip, up).to(memory_format=torch.channels_last)

    def no_zeros(grad: Tensor, skip: Tensor) -> Tensor:
        return crop_concat_bwd_reference(grad, skip) + skip * 0 + 1

    skip, up = inputs(SHAPES[0], torch.float32, "cpu")
    for wrong in (off_by_one, wrong_order, wrong_layout):
        with pytest.raises(AssertionError):
            check_forward(wrong, skip, up)
    with pytest.raises(AssertionError):
        check_backward(no_zeros, crop_concat_reference(skip, up), skip)
