"""Convolutions of a few channels on the CPU against eager PyTorch and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastunet
from fastunet.backends import EXTENSION_MISSING
from fastunet.ops import _amx, eager
from fastunet.ops.conv_relu import few_channels

from ..accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(bool(EXTENSION_MISSING), reason="the native extension is not built")
FLOAT32 = torch.float32
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(bool(_amx.why_not_here()), reason=f"{_amx.why_not_here()}"),
)

# B, C, C_out, H, W, padding
SHAPES = [
    (1, 1, 64, 20, 38, 0),
    # channels beyond the groups that are summed together, one of them, a ragged rest of pixels
    (2, 2, 40, 9, 17, 1),
    (3, 1, 8, 3, 3, 0),
    (1, 2, 72, 2, 3, 1),
    (1, 1, 32, 5, 4, 1),
]
# what AMX takes besides: one line or two, channels that fill no block
WIDE_SHAPES = [
    (2, 3, 33, 8, 19, 1),
    (1, 4, 1, 4, 21, 0),
    (1, 5, 31, 6, 35, 0),
    (1, 7, 65, 7, 18, 1),
]


def layer(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    b, c, c_out, h, w, padding = shape
    return {
        "x": torch.randn(b, c, h, w).to(dtype, memory_format=torch.channels_last),
        "weight": torch.randn(c_out, c, 3, 3).div(3 * c**0.5).to(dtype),
        "bias": torch.randn(c_out).to(dtype),
        "padding": padding,
    }


def check(arguments: dict[str, Any], function: Callable[..., Tensor]) -> Tensor:
    """``function`` is as accurate as PyTorch with and without bias and ReLU; the first result."""
    results = []
    for bias in (arguments["bias"], None):
        for relu in (True, False):
            given = {**arguments, "bias": bias}
            got = function(**given, relu=relu)
            wide = {
                name: value.double() if isinstance(value, Tensor) else value
                for name, value in given.items()
            }
            plain, exact = (F.conv2d(**each) for each in (given, wide))
            if relu:
                plain, exact = plain.relu(), exact.relu()
            assert_as_accurate(got, plain, exact)
            assert got.is_contiguous(memory_format=torch.channels_last)
            results.append(got)
    return results[0]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE_SHAPES], ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = layer(shape, dtype)
    x, weight = arguments["x"], arguments["weight"]
    taken = dtype == torch.bfloat16 or shape in SHAPES
    assert (few_channels.unsupported(x, weight, None) is None) == taken
    if taken:
        want = check(arguments, few_channels.conv_relu)
        assert torch.equal(fastunet.conv_relu(**arguments), want)
        if min(want.shape[2:]) > 1:
            y, pooled = fastunet.conv_relu(**arguments, pool=True)
            assert torch.equal(y, want)
            assert torch.equal(pooled, F.max_pool2d(want, 2))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    arguments = layer((2, 2, 64, 90, 70, 1), dtype)
    before, results = torch.get_num_threads(), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(few_channels.conv_relu(**arguments, relu=True))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_odd_numbers_stay_where_they_are(dtype: torch.dtype) -> None:
    arguments = layer((1, 2, 32, 9, 24, 1), dtype)
    x = arguments["x"]
    x[0, 0, 4, 6], x[0, 1, 7, 20] = torch.nan, -torch.inf
    got, want = fastunet.conv_relu(**arguments), eager.conv_relu(**arguments)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf())
    zeros = {**arguments, "x": torch.zeros_like(x), "bias": -torch.zeros(32, dtype=dtype)}
    assert not fastunet.conv_relu(**zeros).signbit().any()


def test_strides() -> None:
    arguments = layer((2, 2, 16, 10, 12, 0), torch.float32)
    x, weight = arguments["x"], arguments["weight"]
    want = few_channels.conv_relu(**arguments, relu=True)
    for name, view in {
        "x": torch.stack([x, x], 4)[..., 0],
        "weight": weight.contiguous(memory_format=torch.channels_last),
        "bias": torch.stack([arguments["bias"]] * 2, 1)[:, 0],
    }.items():
        assert torch.equal(few_channels.conv_relu(**{**arguments, name: view}, relu=True), want)


def test_rejects() -> None:
    x, weight = torch.zeros(1, 5, 5, 2), torch.zeros(8, 3, 3, 2)
    bias = torch.zeros(8)
    for message, arguments in (
        ("x must be float32", (x.double(), weight, bias, 0)),
        ("x must be", (x.mT, weight, bias, 0)),
        ("x must be", (x[:0], weight, bias, 0)),
        ("of few channels", (torch.zeros(1, 5, 5, 8), torch.zeros(8, 3, 3, 8), bias, 0)),
        ("weight must", (x, weight.bfloat16(), bias, 0)),
        ("weight must", (x, weight[:, 1:].contiguous(), bias, 0)),
        ("weight must", (x, weight[..., :1].contiguous(), bias, 0)),
        ("multiple of 8", (x, weight[:7], bias[:7], 0)),
        ("bias must", (x, weight, bias[1:], 0)),
        ("smaller than", (x[:, :2].contiguous(), weight, bias, 0)),
        ("smaller than", (x, weight, bias, -2)),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastunet.conv_few(*arguments, True)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_check_can_fail(dtype: torch.dtype) -> None:
    arguments = layer((1, 1, 32, 9, 24, 1), dtype)

    def swapped(weight: Tensor, **others: Any) -> Tensor:
        return few_channels.conv_relu(weight=weight.mT, **others)

    with pytest.raises(AssertionError, match="error"):
        check(arguments, swapped)
