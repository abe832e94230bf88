"""Convolutions on AMX against eager PyTorch and float64, whatever the operators choose."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.ops import _amx
from fastunet.ops.eager import conv_relu

from ..accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(
    bool(_amx.why_not_here()), reason=f"no kernels for AMX here: {_amx.why_not_here()}"
)
LAST = torch.channels_last

# B, C_crop, C, C_out, H, W, padding; C_crop 0 is none
SHAPES = [
    (1, 0, 8, 1, 3, 3, 0),
    (1, 0, 32, 32, 18, 18, 0),
    # a strip of one column, an odd last row, channels that fill no block
    (2, 0, 33, 31, 8, 19, 0),
    (2, 40, 24, 48, 7, 35, 1),
    (1, 64, 64, 96, 13, 34, 0),
    # more blocks of channels than are computed together, several bands
    (1, 0, 160, 64, 70, 40, 1),
    (3, 5, 9, 70, 1, 1, 1),
    # tasks pack their own weights, in one band and in two
    (1, 0, 48, 250, 12, 19, 0),
    (1, 0, 512, 256, 12, 66, 0),
]


def images(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=LAST)


def weights(c_out: int, c_in: int) -> Tensor:
    return images(c_out, c_in, 3, 3).div_(3 * c_in**0.5)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads: with more than there are bands, output channels are shared out too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_conv_relu(shape: tuple[int, ...], pool: bool, threads: int) -> None:
    b, c_crop, c, c_out, h, w, padding = shape
    x, crop = images(b, c, h, w), images(b, c_crop, h, w) if c_crop else None
    weight, bias = weights(c_out, c_crop + c), torch.randn(c_out).bfloat16()
    y, pooled = _amx.conv_relu(x, crop, weight, bias, padding, pool)
    source = x if crop is None else torch.cat([crop, x], 1)
    exact = conv_relu(source.double(), weight.double(), bias.double(), padding=padding)
    assert_as_accurate(y, conv_relu(source, weight, bias, padding=padding), exact)
    assert y.is_contiguous(memory_format=LAST)
    if pool and min(y.shape[2:]) > 1:
        assert torch.equal(pooled, F.max_pool2d(y, 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_conv_grad(shape: tuple[int, ...], masked: bool, threads: int) -> None:
    b, _, c_out, c, h, w, padding = shape
    weight = weights(c_out, c)
    x = images(b, c, h, w)
    grad = images(b, c_out, h + 2 * padding - 2, w + 2 * padding - 2)
    mask = x if masked else None
    eager, exact = (
        torch.ops.aten.convolution_backward(
            g, i, k, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        for g, i, k in ((grad, x, weight), (grad.double(), x.double(), weight.double()))
    )
    got = _amx.conv_grad(grad, weight, padding, mask)
    if masked:
        eager, exact = eager * (x > 0), exact * (x > 0)
        assert got[x <= 0].count_nonzero() == 0
    assert_as_accurate(got, eager, exact)


# also the image itself, bands that end within an image, and one over several images
GRAD_SHAPES = [
    *SHAPES,
    (2, 0, 1, 64, 90, 91, 0),
    (3, 0, 3, 7, 120, 101, 1),
    (4, 0, 40, 33, 6, 5, 1),
]


@pytest.mark.parametrize("shape", GRAD_SHAPES)
def test_grad_weight(shape: tuple[int, ...], threads: int) -> None:
    b, _, c, c_out, h, w, padding = shape
    x, weight = images(b, c, h, w), weights(c_out, c)
    grad = images(b, c_out, h + 2 * padding - 2, w + 2 * padding - 2)
    (_, eager, _), (_, exact, of_bias) = (
        torch.ops.aten.convolution_backward(
            g, i, k, [c_out], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, True]
        )
        for g, i, k in ((grad, x, weight), (grad.double(), x.double(), weight.double()))
    )
    got, bias = _amx.grad_weight(grad, x, padding)
    assert got.is_contiguous(memory_format=LAST)
    assert_as_accurate(got, eager, exact)
    assert_as_accurate(bias, grad.sum((0, 2, 3)), of_bias)


def test_grad_weight_of_large_values_and_parts() -> None:
    """Sums of parts, of channels that fill no tile, where a single wrong pixel is seen."""
    x, grad = images(2, 17, 150, 149), images(2, 47, 148, 147)
    x, grad = (x > 0).bfloat16(), (grad > 0).bfloat16()
    got, bias = _amx.grad_weight(grad, x, 0)
    exact = torch.ops.aten.convolution_backward(
        grad.float(), x.float(), weights(47, 17).float(), None, [1, 1], [0, 0], [1, 1], False,
        [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip
    # counts, which float32 holds exactly
    assert torch.equal(got, exact.bfloat16())
    assert torch.equal(bias, grad.float().sum((0, 2, 3)).bfloat16())


@pytest.mark.parametrize("shape", GRAD_SHAPES)
def test_threads_change_no_bit_of_grad_weight(shape: tuple[int, ...]) -> None:
    b, _, c, c_out, h, w, padding = shape
    x = images(b, c, h, w)
    grad = images(b, c_out, h + 2 * padding - 2, w + 2 * padding - 2)
    before, results = torch.get_num_threads(), []
    for number in (1, 3, 8):
        torch.set_num_threads(number)
        results.append(_amx.grad_weight(grad, x, padding))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit(shape: tuple[int, ...]) -> None:
    b, c_crop, c, c_out, h, w, padding = shape
    x, crop = images(b, c, h, w), images(b, c_crop, h, w) if c_crop else None
    weight = weights(c_out, c_crop + c)
    before, results = torch.get_num_threads(), []
    for number in (1, 3, 8):
        torch.set_num_threads(number)
        results.append(_amx.conv_relu(x, crop, weight, None, padding, False)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nan_and_infinity_stay_where_they_are() -> None:
    x, weight = images(1, 32, 12, 24), weights(32, 32)
    x[0, 3, 5, 6], x[0, 4, 9, 20] = torch.nan, -torch.inf
    y, pooled = _amx.conv_relu(x, None, weight, None, 1, True)
    want = conv_relu(x, weight, None, padding=1, pool=True)
    for got, eager in zip((y, pooled), want, strict=True):
        assert torch.equal(got.isnan(), eager.isnan())
        assert torch.equal(got.isposinf(), eager.isposinf())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], 3)[..., x.shape[3] :],
        lambda x: torch.cat([x, x], 1).contiguous(memory_format=LAST)[:, x.shape[1] :],
        lambda x: x.contiguous(),
        lambda x: x[:1].expand_as(x),
    ],
    ids=["rows", "channels", "planes", "one image"],
)
def test_strides(view: Callable[[Tensor], Tensor]) -> None:
    x, weight = view(images(2, 40, 9, 20)), weights(32, 40)
    dense = x.contiguous(memory_format=LAST)
    for k in (weight, weight.contiguous(), weight.flip(3)):
        got, want = (_amx.conv_relu(i, None, k, None, 0, False)[0] for i in (x, dense))
        assert torch.equal(got, want)
        assert_as_accurate(got, conv_relu(dense, k), conv_relu(dense.double(), k.double()))
    for grads, given in (((x, dense), images(2, 7, 9, 20)), ((dense,) * 2, x)):
        assert all(map(torch.equal, *(_amx.grad_weight(grad, given, 1) for grad in grads)))


@pytest.mark.parametrize(
    ("c_in", "c_out", "forward", "weights_too"),
    [(7, 16, False, True), (8, 16, False, False), (16, 16, False, False), (16, 17, True, True)],
)
def test_narrow_layers_are_left_to_onednn(
    c_in: int, c_out: int, forward: bool, weights_too: bool
) -> None:
    x, weight = images(1, c_in, 8, 8), weights(c_out, c_in)
    assert (_amx.unsupported(x, weight) is None) == forward
    assert (_amx.unsupported_grad_weight(x, weight) is None) == weights_too
    assert (_amx.unsupported_few(x, weight) is None) == (c_in == 7)


def test_rejects() -> None:
    x, weight, bias = images(1, 32, 8, 8), weights(16, 32), torch.zeros(16).bfloat16()
    operators = torch.ops.fastunet
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("bfloat16 of rank 4", operators.conv_relu_amx, (x.float(), None, weight, bias, 0, False)),
        ("next to each", operators.conv_relu_amx, (x.contiguous(), None, weight, bias, 0, False)),
        ("cropped to x", operators.conv_relu_amx, (x, x[..., 1:], weight, bias, 0, False)),
        ("weight must", operators.conv_relu_amx, (x, x, weight, bias, 0, False)),
        ("weight must", operators.conv_relu_amx, (x, None, weight[:, :, 1:], bias, 0, False)),
        ("weight must", operators.conv_relu_amx, (x, None, weight.mT, bias, 0, False)),
        ("bias must", operators.conv_relu_amx, (x, None, weight, bias[1:], 0, False)),
        ("too few pixels", operators.conv_relu_amx, (x[..., :2], None, weight, bias, 0, False)),
        ("padding must", operators.conv_relu_amx, (x, None, weight, bias, -1, False)),
        ("have pixels", operators.conv_relu_amx, (x[:0], None, weight, bias, 0, False)),
        ("weight must", operators.conv_grad_amx, (x, weight, 0, None)),
        ("mask must", operators.conv_grad_amx, (x[:, :16], weight, 1, x)),
        ("grad must be", operators.grad_weight_amx, (x, x, 0)),
        ("grad must be", operators.grad_weight_amx, (images(2, 8, 8, 8), x, 1)),
        ("bfloat16 of rank 4", operators.grad_weight_amx, (x, x.float(), 1)),
        ("have pixels", operators.grad_weight_amx, (x[..., :0], x[..., :2], 0)),
        ("padding must", operators.grad_weight_amx, (x, x, 2)),
    ]
    for message, operator, arguments in calls:
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_check_can_fail() -> None:
    x, weight = images(1, 32, 12, 24), weights(32, 32)
    exact, eager = conv_relu(x.double(), weight.double()), conv_relu(x, weight)
    swapped = weight.clone(memory_format=torch.preserve_format)
    swapped[:, :, 0, 0], swapped[:, :, 0, 1] = weight[:, :, 0, 1], weight[:, :, 0, 0]
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(_amx.conv_relu(x, None, swapped, None, 0, False)[0], eager, exact)
    grad = images(1, 32, 10, 22)
    exact, eager = (
        torch.ops.aten.convolution_backward(
            *given, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
        )[1]
        for given in ((grad.double(), x.double(), weight.double()), (grad, x, weight))
    )
    grad[0, 0, 9, 21] += 1
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(_amx.grad_weight(grad, x, 0)[0], eager, exact)
