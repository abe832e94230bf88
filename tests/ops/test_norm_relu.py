"""Normalisation by statistics with ReLU, and the convolution before it, against float64."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet.backends import EXTENSION_MISSING
from fastunet.ops import conv_norm_relu, eager, folding, use_winograd
from fastunet.ops.conv_relu import conv3x3
from fastunet.ops.norm_relu import Norm, norm_relu, unsupported
from fastunet.ops.norm_relu.reference import norm_relu_bwd_reference, norm_relu_reference

from ..accuracy import assert_as_accurate, max_abs, root_sum_square

needs_kernels = pytest.mark.skipif(bool(EXTENSION_MISSING), reason="no native extension")
# B, C, H, W: more channels than a strip, one alone, odd sizes, a row, many parts
SHAPES = [(2, 70, 37, 40), (3, 1, 9, 8), (2, 200, 1, 15), (4, 13, 5, 5), (1, 8, 2, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# what normalises, and the slope below zero
KINDS = [
    (nn.BatchNorm2d, 0.0),
    (nn.BatchNorm2d, 0.01),
    (nn.BatchNorm2d, 1.0),
    (nn.InstanceNorm2d, 0.0),
    (nn.InstanceNorm2d, 0.3),
    (nn.InstanceNorm2d, 1.0),
]
every_kind = pytest.mark.parametrize(
    ("kind", "slope"), KINDS, ids=lambda value: getattr(value, "__name__", str(value))
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Images whose channels have different means and spreads."""
    scale = torch.arange(1.0, shape[1] + 1).view(1, -1, 1, 1)
    x = torch.randn(shape) * scale.sqrt() + scale
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def normalisation(channels: int, kind: Any = nn.BatchNorm2d, **options: Any) -> Norm:
    norm: Norm = kind(channels, **{"affine": True, **options})
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def plain(x: Tensor, norm: Norm, *, negative_slope: float = 0.0, pool: bool = False) -> Any:
    y = F.leaky_relu(norm(x), negative_slope)
    return (y, F.max_pool2d(y, 2)) if pool else y


def results(
    operator: Any, x: Tensor, norm: Norm, pool: bool = False, slope: float = 0.0
) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics, of a normalisation of its own."""
    norm, x = copy.deepcopy(norm), x.detach().requires_grad_()
    given = operator(x, norm, negative_slope=slope, pool=pool)
    outputs = given if pool else (given,)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    leaves = dict(norm.named_parameters())
    got = torch.autograd.grad(outputs, [x, *leaves.values()], grads)
    return {
        **{f"output {i}": y for i, y in enumerate(outputs)},
        **dict(zip(("x", *leaves), got, strict=True)),
        **dict(norm.named_buffers()),
    }


@needs_kernels
@every_dtype
@every_kind
@pytest.mark.parametrize("pool", [False, True])
@every_shape
def test_forward_and_backward(
    shape: tuple[int, ...], pool: bool, kind: Any, slope: float, dtype: torch.dtype
) -> None:
    if pool and (slope or min(shape[2:]) < 2):
        pytest.skip("pooled with ReLU alone, and if large enough")
    x, norm = batch(shape, dtype), normalisation(shape[1], kind)
    ours = results(norm_relu, x, norm, pool, slope)
    # the more accurate of PyTorch's two ways
    eagerly = results(plain, x.contiguous(), norm, pool, slope)
    exact = results(plain, x.double(), copy.deepcopy(norm).double(), pool, slope)
    for name, tensor in ours.items():
        if name == "num_batches_tracked":
            assert torch.equal(tensor, eagerly[name])
            continue
        # where bfloat16 makes values equal, another of a block may be the largest
        size = root_sum_square if name == "x" else max_abs
        assert_as_accurate(tensor, eagerly[name], exact[name], size)
    assert ours["output 0"].is_contiguous(memory_format=torch.channels_last)


@every_kind
@pytest.mark.parametrize("pool", [False, True])
def test_reference(pool: bool, kind: Any, slope: float) -> None:
    if pool and slope:
        pytest.skip("pooled with ReLU alone")
    x, norm = batch((2, 5, 7, 6)).double(), normalisation(5, kind).double()
    want = results(plain, x, norm, pool, slope)
    tensors = (x, norm.weight, norm.bias)
    options = (norm.eps, slope, kind is nn.InstanceNorm2d)
    y, pooled, mean, var = norm_relu_reference(*tensors, *options, pool)
    generator = torch.Generator().manual_seed(3)
    grads = [
        torch.randn(tensor.shape, generator=generator).bfloat16().to(y.dtype)
        for tensor in ([y, pooled] if pool else [y])
    ]
    of_pooled = grads[1] if pool else None
    needed = [True, True, True]
    got = norm_relu_bwd_reference(grads[0], of_pooled, y, *tensors, mean, var, *options, needed)
    for actual, name in zip((y, *got), ("output 0", "x", "weight", "bias"), strict=True):
        torch.testing.assert_close(actual, want[name])
    if pool:
        torch.testing.assert_close(pooled, want["output 1"])


@needs_kernels
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_same_bits_for_any_threads(kind: Any) -> None:
    x, norm = batch((2, 33, 67, 50)), normalisation(33, kind)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 3, threads):
            torch.set_num_threads(count)
            runs.append(results(norm_relu, x, norm, True))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for name, tensor in run.items():
            assert torch.equal(tensor, runs[0][name]), name


@needs_kernels
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_means_far_from_zero(mean: float) -> None:
    x, norm = batch((2, 5, 40, 41)) + mean, normalisation(5)
    x[0, :, 0, 0] = 0.0
    exact = results(plain, x.double(), copy.deepcopy(norm).double(), False)
    ours, eagerly = (results(f, x, norm, False) for f in (norm_relu, plain))
    for name in ("output 0", "running_mean", "running_var"):
        assert_as_accurate(ours[name], eagerly[name], exact[name])


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.1}],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    x, norm = batch((2, 6, 9, 7)), normalisation(6, **options)
    for mode in (True, False):
        norm.train(mode)
        if not mode and norm.track_running_stats:
            continue
        exact = results(plain, x.double(), copy.deepcopy(norm).double(), False)
        ours, eagerly = (
            results(f, x.contiguous() if f is plain else x, norm, False) for f in (norm_relu, plain)
        )
        for name in exact.keys() - {"num_batches_tracked"}:
            assert_as_accurate(ours[name], eagerly[name], exact[name])


@needs_kernels
def test_nan_stays_in_its_channel() -> None:
    x = batch((2, 4, 6, 6))
    x[1, 2, 3, 4] = torch.nan
    for kind in (nn.BatchNorm2d, nn.InstanceNorm2d):
        y, pooled = norm_relu(x, normalisation(4, kind), pool=True)
        leaky = norm_relu(x, normalisation(4, kind), negative_slope=0.1)
        for tensor in (y, pooled, leaky):
            assert tensor[1, 2].isnan().all()
            assert tensor[0, 2].isnan().all() == (kind is nn.BatchNorm2d)
            assert not tensor[:, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize("with_skip", [False, True])
def test_with_convolution(with_skip: bool) -> None:
    """Of any dtype and layout, also where PyTorch's own operators run."""
    use_winograd(False)
    for dtype, layout in (
        (torch.float32, torch.channels_last),
        (torch.float32, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
        (torch.float64, torch.channels_last),
    ):
        conv: Any = nn.Conv2d(12, 10, 3, padding=1)
        conv = conv.to(dtype, memory_format=layout)
        norm = normalisation(10).to(dtype)
        c = 7 if with_skip else 12
        x = torch.randn(2, c, 24, 12).to(dtype, memory_format=layout)
        skip = torch.randn(2, 12 - c, 26, 15).to(x) if with_skip else None

        def run(
            operator: Any, parts: tuple[Any, ...], x: Tensor = x, skip: Tensor | None = skip
        ) -> list[Tensor]:
            conv, norm = copy.deepcopy(parts)
            leaves = [t.detach().requires_grad_() for t in (x, skip) if t is not None]
            given = dict(zip(("x", "skip"), leaves, strict=False))
            y, pooled = operator(given.pop("x"), conv, norm, pool=True, **given)
            total = (y.double().sum() * 0.1) + pooled.double().square().sum()
            grads = torch.autograd.grad(total, [*leaves, *conv.parameters(), *norm.parameters()])
            return [y, pooled, *grads, norm.running_mean, norm.running_var]

        wide = tuple(copy.deepcopy(part).double() for part in (conv, norm))
        exact = run(eager.conv_norm_relu, wide, x.double(), None if skip is None else skip.double())
        ours, plain_ = (run(f, (conv, norm)) for f in (conv_norm_relu, eager.conv_norm_relu))
        for actual, want, true in zip(ours, plain_, exact, strict=True):
            assert_as_accurate(actual, want, true, root_sum_square)
    use_winograd(True)


@needs_kernels
def test_registration() -> None:
    torch.use_deterministic_algorithms(False)
    x = batch((1, 9, 8, 8)).requires_grad_()
    weight, bias = torch.randn(2, 9).requires_grad_().unbind()
    for options in ((0.0, False, False), (0.0, True, True), (0.1, True, False)):
        torch.library.opcheck(torch.ops.fastunet.norm_relu, (x, weight, bias, 1e-5, *options))
    kernel = torch.randn(4, 9, 3, 3).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fastunet.conv3x3, (x, kernel.requires_grad_(), None, 1, None))


@needs_kernels
def test_compiles() -> None:
    conv, norm = nn.Conv2d(4, 6, 3, padding=1), normalisation(6)
    conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = batch((2, 4, 12, 10))
    twin = copy.deepcopy(norm)
    compiled = torch.compile(conv_norm_relu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, conv, norm), conv_norm_relu(x, conv, twin))
    for buffer, other in zip(norm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


def test_tiny_convolutions_with_gradients_are_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = batch((2, 4, 8, 8)), nn.Conv2d(4, 16, 3).weight
    monkeypatch.setattr(folding, "FEW_ELEMENTS", 2 * 16 * 8 * 8)
    assert folding.convolving_pays(x, weight)
    assert not folding.convolving_pays(x[:1], weight)
    assert not folding.convolving_pays(x.to("meta"), weight)
    with torch.no_grad():
        assert folding.convolving_pays(x[:1], weight)


def test_unsupported() -> None:
    x, norm = batch((2, 4, 12, 11)), nn.BatchNorm2d(4)
    assert bool(unsupported(x, norm)) == bool(EXTENSION_MISSING)
    assert unsupported(x.double(), norm)
    assert unsupported(x.contiguous(), norm)
    assert unsupported(x[:, :, :, :10].contiguous(memory_format=torch.channels_last), norm)
    assert unsupported(x[:0], norm)
    assert unsupported(x.to("meta"), norm)
    assert unsupported(x, nn.BatchNorm2d(4, momentum=None))
    by_image = nn.InstanceNorm2d(4)
    assert bool(unsupported(batch((1, 4, 2, 1)), by_image)) == bool(EXTENSION_MISSING)
    assert unsupported(batch((300, 4, 1, 1)), by_image)
    assert unsupported(x, nn.InstanceNorm2d(4, track_running_stats=True))
    assert unsupported(x, nn.GroupNorm(2, 4))


def test_one_value_a_channel_is_refused_as_by_pytorch() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_norm_relu(torch.randn(1, 3, 3, 3), conv, norm)


@needs_kernels
def test_native_code_refuses_what_it_cannot_take() -> None:
    operators = torch.ops.fastunet
    x, c, m = torch.randn(2, 4, 4, 3), torch.randn(3), torch.randn(1, 3)
    forward, backward = operators.norm_relu_pixels, operators.norm_relu_pixels_bwd
    plain, leaky = (1e-5, 0.0, False), (1e-5, 0.1, False)
    for message, call in (
        ("x must be float32", lambda: forward(x.double(), c, c, *plain, False)),
        ("x must be .B, H, W, C. contiguous", lambda: forward(x.mT, c, c, *plain, False)),
        ("with pixels", lambda: forward(x[:0], c, c, *plain, False)),
        ("weight must be", lambda: forward(x, c[1:], c, *plain, False)),
        ("bias must be", lambda: forward(x, c, c[None], *plain, False)),
        ("pool must go with", lambda: forward(x, c, c, *leaky, True)),
        ("grad must be as x", lambda: backward(x[1:], x, c, c, m, m, *plain, False, True)),
        ("mean must be", lambda: backward(x, x, c, c, c, m, *plain, False, True)),
        ("mean must be", lambda: backward(x, x, c, c, m, m, 1e-5, 0.0, True, False, True)),
        ("var must be", lambda: backward(x, x, c, c, m, m.double(), *plain, False, True)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_conv3x3_checks_as_conv_relu() -> None:
    with pytest.raises(ValueError, match="conv_relu: weight must be"):
        conv3x3(torch.randn(1, 3, 5, 5), torch.randn(4, 2, 3, 3))


@needs_kernels
@pytest.mark.parametrize("wrong", ["bias", "weight", "slope"])
def test_check_can_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm_relu

    def badly(x: Tensor, norm: Norm, *, negative_slope: float, pool: bool) -> Any:
        if wrong == "bias":
            norm.bias.data += 1e-3
        elif wrong == "weight":
            norm.weight.data *= 1.001
        else:
            negative_slope *= 1.001
        return right(x, norm, negative_slope=negative_slope, pool=pool)

    monkeypatch.setitem(globals(), "norm_relu", badly)
    with pytest.raises(AssertionError, match="is above"):
        test_forward_and_backward((2, 70, 37, 40), False, nn.InstanceNorm2d, 0.3, torch.float32)
