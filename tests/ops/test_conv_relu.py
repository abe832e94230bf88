"""conv_relu against eager PyTorch and float64."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.ops import _amx, _library, eager
from fastunet.ops.conv_relu import onednn, op

from ..accuracy import assert_as_accurate

# (B, C_skip, C, C_out, H, W, padding); C_skip 0 is no skip
SHAPES = [
    (1, 0, 1, 64, 68, 68, 0),
    (1, 64, 64, 64, 36, 36, 0),
    (2, 0, 16, 32, 28, 28, 1),
    (2, 5, 3, 7, 9, 13, 0),
    (2, 0, 8, 16, 11, 9, 1),
    (1, 4, 4, 1, 4, 4, 1),
    (0, 0, 3, 4, 8, 8, 0),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    """Winograd's algorithm has a bound of its own, in test_winograd.py."""
    before = fastunet.use_winograd(False)
    yield
    fastunet.use_winograd(before)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Any]:
    b, c_skip, c, c_out, h, w, padding = shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    scale = (2 / (9 * (c_skip + c))) ** 0.5
    images = {
        "x": torch.randn(b, c, h, w, **options),
        "weight": torch.randn(c_out, c_skip + c, 3, 3, **options) * scale,
        "skip": torch.randn(b, c_skip, h + 5, w + 4, **options) if c_skip else None,
    }
    laid_out = {
        name: None if image is None else image.contiguous(memory_format=layout)
        for name, image in images.items()
    }
    return {**laid_out, "bias": torch.randn(c_out, **options), "padding": padding}


def run(operator: Any, arguments: dict[str, Any], pool: bool) -> tuple[Tensor, ...]:
    result = operator(**arguments, pool=pool)
    return result if pool else (result,)


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def gradients(operator: Any, arguments: dict[str, Any], pool: bool) -> tuple[Tensor, ...]:
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    outputs = run(operator, {**arguments, **leaves}, pool)
    # a fixed incoming gradient that no symmetry hides
    incoming = [
        torch.linspace(-1, 2, max(y.numel(), 1), device=y.device)[: y.numel()]
        .reshape(y.shape)
        .to(y.dtype)
        for y in outputs
    ]
    return torch.autograd.grad(outputs, list(leaves.values()), incoming)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    pool: bool,
    layout: torch.memory_format,
    device: torch.device,
) -> None:
    arguments = inputs(shape, dtype, device, layout)
    exact = run(eager.conv_relu, cast(arguments, torch.float64), pool)
    plain = run(eager.conv_relu, arguments, pool)
    for got, eager_y, exact_y in zip(
        run(fastunet.conv_relu, arguments, pool), plain, exact, strict=True
    ):
        assert_as_accurate(got, eager_y, exact_y)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    pool: bool,
    layout: torch.memory_format,
    device: torch.device,
) -> None:
    arguments = inputs(shape, dtype, device, layout)
    exact = gradients(eager.conv_relu, cast(arguments, torch.float64), pool)
    plain = gradients(eager.conv_relu, arguments, pool)
    for got, eager_grad, exact_grad in zip(
        gradients(fastunet.conv_relu, arguments, pool), plain, exact, strict=True
    ):
        # a pixel whose float64 value is within rounding of 0 flips its mask in eager too
        assert_as_accurate(got, eager_grad, exact_grad)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", SHAPES[1:6])
def test_weight_gradient_by_products(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not onednn.products_pay(torch.empty(1, 512, 54, 54), torch.empty(512, 512, 3, 3), dtype)
    assert onednn.products_pay(torch.empty(1, 1024, 30, 30), torch.empty(1024, 1024, 3, 3), dtype)
    monkeypatch.setattr(onednn, "FEWEST_PAIRS", dict.fromkeys(DTYPES, 0))
    monkeypatch.setattr(onednn, "PAIRS_PER_PIXEL", 0)
    monkeypatch.setattr(_amx, "why_not_here", lambda: "as elsewhere")
    products, calls = onednn._products_grad_weight, []

    def noted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return products(*arguments)

    monkeypatch.setattr(onednn, "_products_grad_weight", noted)
    test_backward(shape, dtype, False, torch.channels_last, torch.device("cpu"))
    assert calls


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_without_amx(
    shape: tuple[int, ...], pool: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_amx, "why_not_here", lambda: "as elsewhere")
    test_backward(shape, torch.bfloat16, pool, torch.channels_last, torch.device("cpu"))


@pytest.mark.parametrize("pool", [False, True])
def test_gradcheck(pool: bool, device: torch.device) -> None:
    arguments = inputs((2, 2, 3, 4, 6, 7, 1), torch.float64, device)
    names = ("x", "weight", "bias", "skip")
    leaves = [arguments[name].requires_grad_() for name in names]

    def call(*tensors: Tensor) -> Any:
        return fastunet.conv_relu(**dict(zip(names, tensors, strict=True)), padding=1, pool=pool)

    assert torch.autograd.gradcheck(call, leaves)


def pair_inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    first = inputs((2, 8, 8, 16, 13, 14, 0), dtype, device)
    second = inputs((2, 0, 16, 24, 11, 12, 0), dtype, device)
    pair = {f"{name}1": first[name] for name in ("weight", "bias")}
    pair |= {f"{name}2": second[name] for name in ("weight", "bias")}
    images = {
        name: first[name].contiguous(memory_format=torch.channels_last) for name in ("x", "skip")
    }
    return {**pair, **images, "padding": 0}


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair(dtype: torch.dtype, pool: bool, device: torch.device) -> None:
    arguments = pair_inputs(dtype, device)
    wide = cast(arguments, torch.float64)
    for function in (run, gradients):
        exact = function(eager.conv_relu_pair, wide, pool)
        plain = function(eager.conv_relu_pair, arguments, pool)
        got = function(fastunet.conv_relu_pair, arguments, pool)
        for actual, eager_value, exact_value in zip(got, plain, exact, strict=True):
            assert_as_accurate(actual, eager_value, exact_value)


def test_pair_rejects() -> None:
    arguments = pair_inputs(torch.float32, torch.device("cpu"))
    for change, message in (
        ({"weight2": torch.ones(4, 9, 3, 3)}, r"weight must be \[C_out, 16, 3, 3\]"),
        ({"x": arguments["x"][:, :, :4]}, "x must be at least 3 x 3 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            fastunet.conv_relu_pair(**{**arguments, **change})


def test_nan_stays(device: torch.device) -> None:
    arguments = inputs((1, 0, 8, 8, 8, 8, 0), torch.float32, device)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    arguments["x"][0, 3, 4, 4] = float("nan")
    for dtype in DTYPES:
        given = cast(arguments, dtype)
        plain = run(eager.conv_relu, given, True)
        for got, want in zip(run(fastunet.conv_relu, given, True), plain, strict=True):
            assert torch.equal(got.isnan(), want.isnan())


def test_grey_images_come_out_in_channels_last(device: torch.device) -> None:
    x, weight = torch.randn(2, 1, 8, 8, device=device), torch.randn(4, 1, 3, 3, device=device)
    y, pooled = fastunet.conv_relu(x, weight, pool=True)
    for images in (y, pooled):
        assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, eager.conv_relu(x, weight))


def test_only_asked_gradients(device: torch.device) -> None:
    arguments = inputs((1, 2, 3, 4, 6, 6, 0), torch.float32, device)
    for name in ("x", "weight", "bias", "skip"):
        leaf = arguments[name].clone().requires_grad_()
        fastunet.conv_relu(**{**arguments, name: leaf}).sum().backward()
        reference = arguments[name].clone().requires_grad_()
        eager.conv_relu(**{**arguments, name: reference}).sum().backward()
        torch.testing.assert_close(leaf.grad, reference.grad)


def test_strides(device: torch.device) -> None:
    arguments = inputs((2, 4, 8, 8, 12, 12, 0), torch.float32, device)
    want = fastunet.conv_relu(**arguments)
    layouts = {
        "channels_last": arguments
        | {
            name: arguments[name].to(memory_format=torch.channels_last)
            for name in ("x", "weight", "skip")
        },
        "transposed": arguments | {"x": arguments["x"].mT.contiguous().mT},
        "slice": arguments | {"x": torch.stack([arguments["x"]] * 2, 2)[:, :, 1]},
    }
    for name, layout in layouts.items():
        torch.testing.assert_close(fastunet.conv_relu(**layout), want, msg=name)
    y = fastunet.conv_relu(**layouts["channels_last"])
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("operator", ["conv_relu", "conv_relu_pool"])
def test_registration(operator: str, channels_last: bool, device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    arguments = inputs((2, 4, 3, 5, 9, 8, 1), torch.float32, device)
    x, weight, skip = (
        arguments[name].to(memory_format=layout).requires_grad_()
        for name in ("x", "weight", "skip")
    )
    bias = arguments["bias"].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.fastunet, operator), (x, weight, bias, 1, skip))
    torch.library.opcheck(
        getattr(torch.ops.fastunet, operator), (x, weight[:, :3].detach().clone(), None, 0, None)
    )


def test_compile(device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    arguments = inputs((1, 4, 4, 4, 10, 10, 0), torch.float32, device)
    compiled = torch.compile(fastunet.conv_relu, fullgraph=True, backend="aot_eager")
    for pool in (False, True):
        got = gradients(compiled, arguments, pool)
        for a, b in zip(got, gradients(fastunet.conv_relu, arguments, pool), strict=True):
            assert torch.equal(a, b)


def test_autocast() -> None:
    arguments = inputs((1, 4, 4, 4, 10, 10, 0), torch.float32, "cpu")
    arguments["x"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fastunet.conv_relu(**arguments)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, eager.conv_relu(**arguments))
    y.float().sum().backward()
    assert arguments["x"].grad is not None
    assert arguments["x"].grad.dtype == torch.float32


def test_rejects() -> None:
    good = inputs((1, 2, 3, 4, 8, 8, 0), torch.float32, "cpu")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"x": [1.0]}, TypeError, "conv_relu: x must be a torch.Tensor, got list"),
        ({"x": torch.ones(1, 3, 8, 8, dtype=torch.int32)}, TypeError, "x must be floating point"),
        ({"x": torch.ones(3, 8, 8)}, ValueError, r"x must be \[B, C, H, W\], got \[3, 8, 8\]"),
        ({"padding": 2}, ValueError, "padding must be 0 or 1, got 2"),
        ({"skip": torch.ones(1, 2, 7, 8)}, ValueError, r"skip must be \[1, C, H >= 8, W >= 8\]"),
        ({"weight": torch.ones(4, 3, 3, 3)}, ValueError, r"weight must be \[C_out, 5, 3, 3\]"),
        ({"weight": torch.ones(4, 5, 1, 1)}, ValueError, r"weight must be \[C_out, 5, 3, 3\]"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be of shape \[4\], got \[3\] float32"),
        ({"weight": good["weight"].double()}, TypeError, "weight must be torch.float32 as x is"),
        ({"x": torch.ones(1, 3, 2, 8)}, ValueError, "x must be at least 3 x 3 pixels"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            fastunet.conv_relu(**{**good, **change})


def test_check_can_fail() -> None:
    def no_bias(**arguments: Any) -> Any:
        return eager.conv_relu(**{**arguments, "bias": None})

    arguments = inputs(SHAPES[3], torch.float32, "cpu")
    exact = run(eager.conv_relu, cast(arguments, torch.float64), False)[0]
    plain = run(eager.conv_relu, arguments, False)[0]
    with pytest.raises(AssertionError, match="is above"):
        assert_as_accurate(run(no_bias, arguments, False)[0], plain, exact)


def test_small_calls_are_left_to_pytorch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients on a GPU, since Python takes longer to launch ours."""
    monkeypatch.setattr(_library, "FEW_ELEMENTS", 1 << 25)
    arguments = inputs((2, 4, 8, 8, 12, 12, 0), torch.float32, device)
    x, weight = arguments["x"], arguments["weight"].requires_grad_()
    asked = partial(_library.waits_for_python, 1000, x, weight, None)
    assert asked() == (device.type == "cuda")
    assert not _library.waits_for_python(1 << 25, x, weight)
    with torch.no_grad():
        assert not asked()
    with _library.recording():
        assert not asked()
    assert asked() == (device.type == "cuda")


def test_what_is_left_to_pytorch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs((2, 4, 8, 8, 12, 12, 0), torch.float64, device)
    pair = {
        "x": arguments["x"].requires_grad_(),
        "weight1": arguments["weight"].requires_grad_(),
        "bias1": arguments["bias"],
        "weight2": torch.randn(8, 8, 3, 3, dtype=torch.float64, device=device),
        "bias2": None,
        "skip": arguments["skip"],
        "pool": True,
    }
    results = []
    for left in (False, True):
        monkeypatch.setattr(op, "waits_for_python", lambda *_, left=left: left)
        y, pooled = fastunet.conv_relu_pair(**pair)
        grads = torch.autograd.grad(y.sum() + pooled.square().sum(), [pair["x"], pair["weight1"]])
        results.append([y, pooled, *grads])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    with pytest.raises(ValueError, match="conv_relu: weight must be"):
        fastunet.conv_relu_pair(**{**pair, "weight2": pair["weight2"][:, :5]})
