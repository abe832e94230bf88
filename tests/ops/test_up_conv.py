"""up_conv against eager PyTorch and float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.ops import eager

from ..accuracy import assert_as_accurate

# B, C, C_out, H, W
SHAPES = [
    (1, 128, 64, 28, 28),
    (2, 9, 5, 3, 7),
    (2, 64, 32, 9, 17),
    (1, 1, 1, 1, 1),
    (0, 8, 4, 4, 4),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor, Tensor]:
    b, c, c_out, h, w = shape
    x = torch.randn(b, c, h, w, dtype=dtype, device=device)
    weight = torch.randn(c, c_out, 2, 2, dtype=dtype, device=device) / c**0.5
    bias = torch.randn(c_out, dtype=dtype, device=device)
    return x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias


def outcome(operator: Any, arguments: tuple[Tensor, ...], relu: bool) -> tuple[Tensor, ...]:
    """The result and the gradients of all arguments."""
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    y = operator(*leaves, relu=relu)
    # a fixed incoming gradient that no symmetry hides
    incoming = torch.linspace(-1, 2, max(y.numel(), 1), device=y.device)[: y.numel()]
    return (y, *torch.autograd.grad(y, leaves, incoming.reshape(y.shape).to(y.dtype)))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    relu: bool,
    layout: torch.memory_format,
    device: torch.device,
) -> None:
    arguments = inputs(shape, dtype, device, layout)
    exact = outcome(eager.up_conv, tuple(t.double() for t in arguments), relu)
    plain = outcome(eager.up_conv, arguments, relu)
    for got, want, exactly in zip(
        outcome(fastunet.up_conv, arguments, relu), plain, exact, strict=True
    ):
        assert_as_accurate(got, want, exactly)


def test_gradcheck(device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in inputs((2, 3, 4, 3, 2), torch.float64, device)]
    assert torch.autograd.gradcheck(lambda *args: fastunet.up_conv(*args, relu=True), leaves)


def test_only_asked_gradients(device: torch.device) -> None:
    arguments = inputs((1, 8, 32, 5, 6), torch.bfloat16, device, torch.channels_last)
    for k, argument in enumerate(arguments):
        leaves = list(arguments)
        leaves[k] = argument.clone().requires_grad_()
        fastunet.up_conv(*leaves).sum().backward()
        assert leaves[k].grad is not None
        assert torch.equal(leaves[k].grad, outcome_of_sum(arguments, k))


def outcome_of_sum(arguments: tuple[Tensor, ...], k: int) -> Tensor:
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    fastunet.up_conv(*leaves).sum().backward()
    grad = leaves[k].grad
    assert grad is not None
    return grad


def test_output_may_change_in_place_without_relu(device: torch.device) -> None:
    x, weight, bias = inputs((1, 8, 32, 5, 6), torch.float32, device)
    x.requires_grad_()
    fastunet.up_conv(x, weight, bias).mul_(2).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fastunet.up_conv(x, weight, bias, relu=True).mul_(2).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = inputs((2, 32, 32, 5, 6), dtype, device)
    want = fastunet.up_conv(x, weight, bias)
    last = x.contiguous(memory_format=torch.channels_last)
    views = {
        "channels_last": last,
        "rows of a larger buffer": torch.cat([last, last], 3)[..., 6:],
        "channels of a larger buffer": torch.cat([last, last], 1)[:, 32:],
        "transposed": x.mT.contiguous().mT,
    }
    for name, view in views.items():
        got = fastunet.up_conv(view, weight, bias)
        torch.testing.assert_close(got, want, msg=name)
    assert fastunet.up_conv(last, weight, bias).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 32, 32, 4, 5), (2, 32, 32, 1, 1)])
def test_registration(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(False)
    arguments = [t.requires_grad_() for t in inputs(shape, dtype, device, layout)]
    for relu in (False, True):
        torch.library.opcheck(torch.ops.fastunet.up_conv, (*arguments, relu))
    torch.library.opcheck(torch.ops.fastunet.up_conv, (*arguments[:2], None, False))


def test_compile(device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    arguments = inputs((1, 32, 32, 5, 6), torch.bfloat16, device, torch.channels_last)
    compiled = torch.compile(fastunet.up_conv, fullgraph=True, backend="aot_eager")
    for relu in (False, True):
        got, want = (outcome(call, arguments, relu) for call in (compiled, fastunet.up_conv))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast() -> None:
    x, weight, bias = inputs((1, 32, 32, 5, 6), torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        y = fastunet.up_conv(x.requires_grad_(), weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_rejects() -> None:
    x, weight, bias = inputs((1, 3, 4, 5, 6), torch.float32, "cpu")
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (([1.0], weight), TypeError, "up_conv: x must be a torch.Tensor, got list"),
        ((x.int(), weight), TypeError, "x must be floating point"),
        ((x[0], weight), ValueError, r"x must be \[B, C, H, W\]"),
        ((x[..., :0], weight), ValueError, r"x must be \[B, C, H, W\] with pixels"),
        ((x, weight[:2]), ValueError, r"weight must be \[3, C_out, 2, 2\], got \[2, 4, 2, 2\]"),
        ((x, weight[..., :1]), ValueError, r"weight must be \[3, C_out, 2, 2\]"),
        ((x, weight.double()), TypeError, "weight must be torch.float32 as x is"),
        ((x, weight, bias[:3]), ValueError, r"bias must be of shape \[4\], got \[3\] float32"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            fastunet.up_conv(*arguments)


def test_check_can_fail() -> None:
    x, weight, bias = inputs(SHAPES[2], torch.bfloat16, "cpu", torch.channels_last)
    exact = eager.up_conv(x.double(), weight.double(), bias.double())
    with pytest.raises(AssertionError, match="is above"):
        assert_as_accurate(
            fastunet.up_conv(x, weight.mT, bias), eager.up_conv(x, weight, bias), exact
        )
