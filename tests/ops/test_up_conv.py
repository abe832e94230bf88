"""up_conv against eager PyTorch and float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.ops import eager
from fastunet.ops.up_conv import onednn

from ..accuracy import assert_as_accurate

# B, C, C_out, then height and width
SHAPES = [
    (1, 64, 32, 20, 21),
    (2, 33, 7, 26, 17),
    (3, 4, 5, 3, 2),
    (1, 128, 64, 1, 1),
    (1, 1, 1, 5, 4),
    (0, 16, 8, 6, 6),
    (1, 16, 8, 0, 6),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias")


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, Any]:
    b, c, c_out, h, w = shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "x": torch.randn(b, c, h, w, **options).contiguous(memory_format=layout),
        "weight": (torch.randn(c, c_out, 2, 2, **options) / c**0.5).contiguous(
            memory_format=layout
        ),
        "bias": torch.randn(c_out, **options),
    }


def results(operator: Any, arguments: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in NAMES}
    y = operator(**leaves)
    return [y, *torch.autograd.grad(y, list(leaves.values()), grad)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> None:
    arguments = inputs(shape, dtype, device, layout)
    if arguments["x"].numel() == 0 and shape[0]:
        with pytest.raises(ValueError, match="with pixels"):
            fastunet.up_conv(**arguments)
        return
    b, _, c_out, h, w = shape
    grad = torch.randn(b, c_out, 2 * h, 2 * w, dtype=dtype, device=device)
    got = results(fastunet.up_conv, arguments, grad)
    plain = results(eager.up_conv, arguments, grad)
    wide = {name: tensor.double() for name, tensor in arguments.items()}
    for actual, want, exact in zip(
        got, plain, results(eager.up_conv, wide, grad.double()), strict=True
    ):
        assert_as_accurate(actual, want, exact)
    for tensor in got[:3]:
        assert b == 0 or tensor.is_contiguous(memory_format=layout)


# the interpreter's bfloat16 is wrong
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * torch.cuda.is_available())
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 64, 64, 5, 7), (2, 24, 128, 6, 5), (1, 8, 64, 1, 1), (3, 136, 64, 9, 16)], ids=str
)
def test_kernel(
    shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    from fastunet.ops.up_conv import gpu

    arguments = inputs(shape, dtype, kernel_device)
    if not with_bias:
        arguments["bias"] = None
    assert gpu.unsupported(arguments["x"], arguments["weight"]) is None
    wide: dict[str, Any] = {n: None if t is None else t.double() for n, t in arguments.items()}
    plain, exact = eager.up_conv(**arguments), eager.up_conv(**wide)
    # the second launch is as planned by the first
    for _ in range(2):
        y = gpu.up_conv_triton(**arguments)
        assert_as_accurate(y, plain, exact)
    assert y.stride() == plain.stride()


def test_bias_gradient_by_kernel(kernel_device: torch.device) -> None:
    from fastunet.ops.up_conv import gpu

    arguments = inputs((2, 16, 24, 9, 50), torch.float32, kernel_device)
    grad = torch.randn(2, 24, 18, 100, device=kernel_device).to(memory_format=torch.channels_last)
    got = gpu.up_conv_bwd_triton(grad, arguments["x"], arguments["weight"], [True, True, True])
    want = results(eager.up_conv, arguments, grad)[1:]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_unsupported_by_kernel() -> None:
    from fastunet.ops.up_conv import gpu

    x, weight = (inputs((1, 64, 64, 5, 7), torch.float16)[name] for name in ("x", "weight"))
    assert gpu.unsupported(x.float(), weight) is not None
    assert gpu.unsupported(x[:, :60], weight) is not None
    assert gpu.unsupported(x, weight[:, :32]) is not None
    assert gpu.unsupported(x.contiguous(), weight) is not None
    assert gpu.unsupported(x, weight.contiguous()) is not None


@pytest.mark.parametrize("missing", [*NAMES, None])
def test_only_asked_gradients(missing: str | None) -> None:
    arguments = inputs((2, 32, 16, 20, 20), torch.float64)
    leaves = [name for name in NAMES if name != missing]
    grads = []
    for operator in (fastunet.up_conv, eager.up_conv):
        given = {
            name: tensor.clone().requires_grad_(name in leaves)
            for name, tensor in arguments.items()
        }
        if missing is None:
            given["bias"] = None
        operator(**given).square().sum().backward()
        grads.append([None if t is None else t.grad for t in given.values()])
    for ours, want in zip(*grads, strict=True):
        assert (ours is None) == (want is None)
        if ours is not None:
            torch.testing.assert_close(ours, want)


def test_strides() -> None:
    arguments = inputs((1, 32, 16, 20, 20))
    x, weight = arguments["x"], arguments["weight"]
    grad = torch.randn(1, 16, 40, 40)
    want = results(fastunet.up_conv, arguments, grad)
    for name, layout in {
        "contiguous": {"x": x.contiguous(), "weight": weight.contiguous()},
        "slice": {"x": torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 32:]},
        "crop": {"x": torch.nn.functional.pad(x, [2] * 4)[:, :, 2:-2, 2:-2]},
    }.items():
        got = results(fastunet.up_conv, {**arguments, **layout}, grad)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name
    expanded = torch.ones(()).expand(1, 16, 40, 40)
    got = results(fastunet.up_conv, arguments, expanded)
    for a, b in zip(got, results(eager.up_conv, arguments, expanded), strict=True):
        torch.testing.assert_close(a, b)


def test_registration() -> None:
    torch.use_deterministic_algorithms(False)
    for dtype, width in ((torch.float32, 40), (torch.float32, 2), (torch.bfloat16, 3)):
        arguments = inputs((1, 16, 8, 30, width), dtype)
        tensors = [arguments[name].requires_grad_() for name in NAMES]
        torch.library.opcheck(torch.ops.fastunet.up_conv, tuple(tensors))


def test_autocast(device: torch.device) -> None:
    arguments = inputs((1, 32, 16, 20, 20), device=device)
    leaves = [arguments[name].requires_grad_() for name in NAMES]
    with torch.autocast(device.type, torch.bfloat16):
        y = fastunet.up_conv(**arguments)
        want = eager.up_conv(**arguments)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    for grad in torch.autograd.grad(y.float().sum(), leaves):
        assert grad.dtype == torch.float32


def test_both_ways_are_taken() -> None:
    assert onednn._pays(torch.empty(1, 32, 32, 32))
    assert not onednn._pays(torch.empty(1, 8, 99, 99))
    assert not onednn._pays(torch.empty(1, 64, 8, 8))
    assert onednn._pays(torch.empty(1, 4, 2, 2, dtype=torch.bfloat16))
    assert not onednn._pays(torch.empty(1, 64, 99, 99, dtype=torch.float16))


def test_bad_arguments() -> None:
    good = inputs((1, 4, 2, 3, 3))
    for bad, error, message in (
        ({"x": "x"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"x": torch.zeros(1, 4, 3, 3).int()}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(4, 3, 3)}, ValueError, r"x must be \[B, C, H, W\] with pixels"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, r"weight must be \[4, C_out, 2, 2\]"),
        ({"weight": torch.zeros(5, 2, 2, 2)}, ValueError, r"weight must be \[4, C_out, 2, 2\]"),
        ({"weight": good["weight"].double()}, TypeError, "weight must be torch.float32 as x is"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be of shape \[2\]"),
    ):
        with pytest.raises(error, match=f"up_conv: {message}"):
            fastunet.up_conv(**{**good, **bad})


def test_check_can_fail() -> None:
    arguments = inputs((1, 32, 16, 20, 20))
    grad = torch.randn(1, 16, 40, 40)
    wide = {name: tensor.double() for name, tensor in arguments.items()}
    exact = results(eager.up_conv, wide, grad.double())
    arguments["weight"] = arguments["weight"].flip(3)
    for actual, want in zip(results(fastunet.up_conv, arguments, grad)[:2], exact, strict=False):
        with pytest.raises(AssertionError, match="is above"):
            assert_as_accurate(actual, want.float(), want)
