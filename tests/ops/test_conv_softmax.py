"""conv_softmax and conv_argmax against eager PyTorch and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.ops import eager

from ..accuracy import assert_as_accurate

# B, C, K, then height and width
SHAPES = [
    (1, 64, 2, 20, 21),
    (2, 33, 21, 6, 7),
    (1, 1, 1, 5, 4),
    (1, 8, 300, 3, 3),
    (2, 16, 3, 1, 1),
    (0, 16, 3, 6, 6),
    # several chunks and a rest, of few and of many classes, with and without AMX's 32 channels
    (2, 32, 40, 19, 23),
    (2, 20, 256, 7, 9),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
OPERATORS = ("conv_softmax", "conv_argmax")


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, Any]:
    b, c, classes, h, w = shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "x": torch.randn(b, c, h, w, **options).contiguous(memory_format=layout),
        "weight": torch.randn(classes, c, 1, 1, **options) / c**0.5,
        "bias": torch.randn(classes, **options),
    }


def exact_inputs(*arguments: Any) -> dict[str, Any]:
    """As ``inputs``, whose logits no dtype rounds, so that many are equal."""
    return {
        name: None if tensor is None else tensor.clamp(-2, 2).round()
        for name, tensor in inputs(*arguments).items()
    }


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: None if t is None else t.double() for name, t in arguments.items()}


def check_probabilities(operator: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
    """``operator`` is as accurate as PyTorch, and lays a plane out for each class."""
    p, exact = operator(**arguments), eager.conv_softmax(**widened(arguments))
    assert_as_accurate(p, eager.conv_softmax(**arguments), exact)
    assert p.is_contiguous()


def check_labels(operator: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
    """``operator`` gives the labels of float64, where rounding decides on none."""
    labels, exact = operator(**arguments), eager.conv_argmax(**widened(arguments))
    assert labels.dtype == (torch.uint8 if len(arguments["weight"]) <= 256 else torch.int32)
    assert torch.equal(labels, exact)
    assert labels.is_contiguous()


# logits of a pixel, and its label
NAN, INF = float("nan"), float("inf")
ODD = [
    ([1.0, 3.0, 2.0, 3.0], 1),
    ([2.0, 2.0, 2.0, 2.0], 0),
    ([1.0, NAN, 5.0, NAN], 1),
    ([INF, 1.0, NAN, INF], 2),
    ([-INF, -INF, -INF, -INF], 0),
    ([-INF, -5.0, INF, INF], 2),
    ([NAN, NAN, NAN, NAN], 0),
    ([-1.0, -2.0, -3.0, -0.5], 3),
    ([-INF, 0.0, -INF, -INF], 1),
]


def check_odd(
    softmax: Callable[..., Tensor],
    argmax: Callable[..., Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """NaN, infinities and equal logits are taken as PyTorch takes them."""
    x = torch.zeros(1, 8, 1, 1, dtype=dtype, device=device)
    weight = torch.ones(4, 8, 1, 1, dtype=dtype, device=device)
    for logits, label in ODD:
        bias = torch.tensor(logits, dtype=dtype, device=device)
        p, want = softmax(x, weight, bias)[0, :, 0, 0], bias.float().softmax(0)
        torch.testing.assert_close(p, want, equal_nan=True)
        assert bias.argmax() == label
        assert argmax(x, weight, bias).item() == label, logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> None:
    check_probabilities(fastunet.conv_softmax, inputs(shape, dtype, device, layout))
    arguments = exact_inputs(shape, dtype, device, layout)
    check_labels(fastunet.conv_argmax, arguments)
    check_labels(fastunet.conv_argmax, {**arguments, "bias": None})
    p = fastunet.conv_softmax(**arguments)
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_logits(dtype: torch.dtype, device: torch.device) -> None:
    check_odd(fastunet.conv_softmax, fastunet.conv_argmax, dtype, device)


@pytest.mark.parametrize("leaf", ["x", "weight", "bias"])
def test_gradients(leaf: str, device: torch.device) -> None:
    grads = []
    for operator in (fastunet.conv_softmax, eager.conv_softmax):
        torch.manual_seed(0)
        arguments = inputs((2, 16, 3, 9, 8), device=device)
        arguments[leaf].requires_grad_()
        p = operator(**arguments)
        grads.append(torch.autograd.grad(p.square().sum(), arguments[leaf])[0])
    assert torch.equal(*grads)
    labels = fastunet.conv_argmax(**arguments)
    assert not labels.requires_grad
    with torch.no_grad():
        assert not fastunet.conv_softmax(**arguments).requires_grad
        assert torch.equal(labels, fastunet.conv_argmax(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 2, 37, 51), (1, 20, 21, 13, 11)], ids=str)
def test_places_change_no_bit(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """A pixel's probabilities are the same wherever it is, or tiles would show."""
    arguments = inputs(shape, dtype, device)
    x = arguments["x"][..., :1, :1].expand_as(arguments["x"])
    arguments["x"] = x.contiguous(memory_format=torch.channels_last)
    p = fastunet.conv_softmax(**arguments)
    assert torch.equal(p, p[..., :1, :1].expand_as(p))


def test_strides(device: torch.device) -> None:
    arguments = exact_inputs((2, 32, 5, 10, 12), torch.float32, device)
    x, weight, bias = arguments.values()
    wide = torch.stack([weight, weight], 1).flatten(0, 1)
    for name, layout in {
        "transposed": {"x": x.transpose(2, 3).contiguous().transpose(2, 3)},
        "slice": {"x": torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 32:]},
        "crop": {"x": torch.nn.functional.pad(x, [2] * 4)[:, :, 2:-2, 2:-2]},
        "expanded": {"x": x[:, :, :1, :1].expand_as(x)},
        "steps": {"weight": wide[::2], "bias": torch.stack([bias, bias], 1)[:, 0]},
    }.items():
        given = {**arguments, **layout}
        plain = {key: tensor.clone() for key, tensor in given.items()}
        p = fastunet.conv_softmax(**given)
        torch.testing.assert_close(p, fastunet.conv_softmax(**plain), msg=name)
        assert p.is_contiguous(), name
        assert torch.equal(fastunet.conv_argmax(**given), fastunet.conv_argmax(**plain)), name


@pytest.mark.parametrize("name", OPERATORS)
def test_registration(name: str) -> None:
    torch.use_deterministic_algorithms(False)
    operator: Any = getattr(fastunet, name)
    for shape, dtype, layout in (
        ((1, 16, 3, 9, 8), torch.float32, torch.channels_last),
        ((2, 8, 1, 5, 4), torch.bfloat16, torch.contiguous_format),
    ):
        x, weight, bias = exact_inputs(shape, dtype, "cpu", layout).values()
        for last in (bias, None):
            torch.library.opcheck(getattr(torch.ops.fastunet, name), (x, weight, last))
            compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x, weight, last), operator(x, weight, last))
    weight.requires_grad_()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), operator(x, weight))
    assert compiled(x, weight).requires_grad == (name == "conv_softmax")


def test_autocast(device: torch.device) -> None:
    arguments = inputs((1, 32, 3, 20, 20), device=device)
    exact = eager.conv_softmax(**widened(arguments))
    with torch.autocast(device.type, torch.bfloat16):
        p, plain = fastunet.conv_softmax(**arguments), eager.conv_softmax(**arguments)
        labels = fastunet.conv_argmax(**arguments)
    assert_as_accurate(p, plain, exact)
    # of rounded images and weights
    assert not torch.equal(p, fastunet.conv_softmax(**arguments))
    lower = {name: tensor.bfloat16() for name, tensor in arguments.items()}
    assert torch.equal(p, fastunet.conv_softmax(**lower))
    assert torch.equal(labels, fastunet.conv_argmax(**lower))


@pytest.mark.parametrize("name", OPERATORS)
def test_rejects(name: str) -> None:
    good = inputs((1, 4, 2, 3, 3))
    for bad, error, message in (
        ({"x": "x"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"x": torch.zeros(1, 4, 3, 3).int()}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(4, 3, 3)}, ValueError, r"x must be \[B, C, H, W\] with pixels"),
        ({"x": torch.zeros(1, 4, 0, 3)}, ValueError, r"x must be \[B, C, H, W\] with pixels"),
        ({"weight": torch.zeros(2, 4, 3, 3)}, ValueError, r"weight must be \[K, 4, 1, 1\]"),
        ({"weight": torch.zeros(2, 5, 1, 1)}, ValueError, r"weight must be \[K, 4, 1, 1\]"),
        ({"weight": torch.zeros(0, 4, 1, 1)}, ValueError, r"weight must be \[K, 4, 1, 1\]"),
        ({"weight": good["weight"].double()}, TypeError, "weight must be torch.float32 as x is"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be of shape \[2\]"),
    ):
        with pytest.raises(error, match=f"{name}: {message}"):
            getattr(fastunet, name)(**{**good, **bad})


def test_check_can_fail() -> None:
    arguments = inputs((1, 32, 5, 20, 20))

    def wrong(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: function(x, weight, bias.flip(0))

    with pytest.raises(AssertionError, match="is above"):
        check_probabilities(wrong(fastunet.conv_softmax), arguments)
    with pytest.raises(AssertionError):
        check_labels(wrong(fastunet.conv_argmax), arguments)

    def last_largest(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        labels = len(weight) - 1 - fastunet.conv_argmax(x, weight.flip(0), bias.flip(0))
        return labels.to(torch.uint8)

    with pytest.raises(AssertionError):
        check_labels(last_largest, exact_inputs((1, 4, 5, 20, 20)))
    with pytest.raises(AssertionError):
        check_odd(fastunet.conv_softmax, last_largest, torch.float32, torch.device("cpu"))
