"""conv_relu by Winograd's algorithm against float64."""

import csv
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.backends import EXTENSION_MISSING
from fastunet.ops import eager
from fastunet.ops.conv_relu import winograd_rule
from fastunet.ops.conv_relu.reference import conv_relu_bwd_reference

from ..accuracy import assert_within_winograd, max_abs

pytestmark = pytest.mark.skipif(bool(EXTENSION_MISSING), reason=EXTENSION_MISSING or "never")


RULE = winograd_rule.pays
KINDS: tuple[winograd_rule.Kind, ...] = ("forward", "images", "weights")


class Shape(NamedTuple):
    """Of a call; without a skip c_skip is 0."""

    b: int
    c_skip: int
    c: int
    c_out: int
    height: int
    width: int
    padding: int
    bias: bool = True


def random_shapes(count: int) -> list[Shape]:
    draw = random.Random(0)
    shapes: list[Shape] = []
    while len(shapes) < count:
        shape = Shape(
            draw.randint(0, 3),
            draw.choice([0, draw.randint(1, 65)]),
            draw.randint(1, 130),
            draw.randint(1, 130),
            draw.randint(1, 40),
            draw.randint(1, 40),
            draw.randint(0, 1),
            draw.random() < 0.8,
        )
        if min(shape.height, shape.width) > 2 - 2 * shape.padding:
            shapes.append(shape)
    return shapes


# more output channels than tiles, and fewer; several blocks of each axis; tiles in several groups
LARGE = [
    Shape(1, 0, 300, 700, 20, 22, 0),
    Shape(1, 0, 40, 400, 90, 70, 1),
    Shape(1, 64, 64, 64, 130, 131, 0),
    Shape(2, 0, 420, 24, 9, 50, 1),
]


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Winograd serves wherever it can, and is switched on afterwards."""
    monkeypatch.setattr(winograd_rule, "pays", lambda kind, task: True)
    yield
    fastunet.use_winograd(True)


def inputs(shape: Shape) -> dict[str, Any]:
    channels = shape.c_skip + shape.c
    layout = torch.channels_last

    def images(c: int, height: int, width: int) -> Tensor:
        return torch.randn(shape.b, c, height, width).contiguous(memory_format=layout)

    scale = (2 / (9 * channels)) ** 0.5
    return {
        "x": images(shape.c, shape.height, shape.width),
        "weight": (scale * torch.randn(shape.c_out, channels, 3, 3)).to(memory_format=layout),
        "bias": torch.randn(shape.c_out) if shape.bias else None,
        "skip": images(shape.c_skip, shape.height + 5, shape.width + 4) if shape.c_skip else None,
        "padding": shape.padding,
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def exact_convolution(arguments: dict[str, Any]) -> Tensor:
    """In float64, before the ReLU: where all results are clamped they have no size."""
    exact = wide(arguments)
    source = exact["x"]
    if exact["skip"] is not None:
        source = eager.crop_concat(exact["skip"], source)
    return torch.conv2d(source, exact["weight"], exact["bias"], padding=exact["padding"])


def pools(arguments: dict[str, Any]) -> bool:
    return min(arguments["x"].shape[2:]) - 2 + 2 * arguments["padding"] >= 2


@pytest.mark.parametrize("shape", [*random_shapes(40), *LARGE], ids=str)
def test_forward(shape: Shape) -> None:
    arguments = inputs(shape)
    exact = exact_convolution(arguments)
    y = fastunet.conv_relu(**arguments)
    assert_within_winograd(y, exact.relu(), max_abs(exact))
    if pools(arguments):
        again, pooled = fastunet.conv_relu(**arguments, pool=True)
        assert torch.equal(again, y)
        assert torch.equal(pooled, torch.max_pool2d(y, 2))


@pytest.mark.parametrize("flags", [(False, False), (True, True)])
@pytest.mark.parametrize("shape", [*random_shapes(40), *LARGE], ids=str)
def test_backward(shape: Shape, flags: tuple[bool, bool]) -> None:
    """For the ReLU's mask as it came out: a value that rounds to the other side has another."""
    arguments = inputs(shape)
    x, weight, skip = (arguments[name] for name in ("x", "weight", "skip"))
    ops, rest = torch.ops.fastunet, (shape.padding, skip)
    pool = pools(arguments) and not flags[1]
    if pool:
        y, pooled = ops.conv_relu_pool(x, weight, None, *rest)
    else:
        y, pooled = ops.conv_relu(x, weight, None, *rest), None
    grads = [None if image is None else torch.randn_like(image) for image in (y, pooled)]
    tensors = [*grads, y, x, weight, skip]
    needed = [True, True, True, skip is not None]
    got = ops.conv_relu_bwd(*tensors, shape.padding, needed, *flags)
    reference: Any = conv_relu_bwd_reference
    wide_tensors = [None if t is None else t.double() for t in tensors]
    exact = reference(*wide_tensors, shape.padding, needed, *flags)
    for name, a, b, like in zip("xwbs", got, exact, (x, weight, None, skip), strict=True):
        assert_within_winograd(a, b)
        if like is not None and shape.b:
            assert a.stride() == torch.empty_like(like).stride(), name


def test_only_asked_gradients() -> None:
    shape = Shape(1, 5, 6, 7, 9, 10, 1)
    arguments = inputs(shape)
    for name in ("x", "weight", "bias", "skip"):
        leaf = arguments[name].clone().requires_grad_()
        fastunet.conv_relu(**{**arguments, name: leaf}).square().sum().backward()
        exact = wide(arguments)
        exact[name].requires_grad_()
        eager.conv_relu(**exact).square().sum().backward()
        assert_within_winograd(leaf.grad, exact[name].grad)


def test_strides() -> None:
    arguments = inputs(Shape(2, 8, 24, 32, 14, 17, 0))
    want = fastunet.conv_relu(**arguments)
    x, weight, skip = (arguments[name] for name in ("x", "weight", "skip"))
    layouts = {
        "contiguous x": {"x": x.contiguous()},
        "contiguous weight": {"weight": weight.contiguous()},
        "slice": {"x": torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 24:]},
        "crop": {"skip": torch.nn.functional.pad(skip, [2] * 4)[:, :, 2:-2, 2:-2]},
        "expanded": {"bias": torch.ones(1).expand(32)},
    }
    for name, layout in layouts.items():
        got = fastunet.conv_relu(**{**arguments, **layout})
        exact = exact_convolution({**arguments, **layout})
        assert_within_winograd(got, exact.relu(), max_abs(exact))
        assert got.stride() == want.stride(), name


def test_registration() -> None:
    torch.use_deterministic_algorithms(False)
    arguments = inputs(Shape(1, 16, 16, 32, 12, 13, 1))
    tensors = [arguments[name].requires_grad_() for name in ("x", "weight", "bias")]
    for operator in (torch.ops.fastunet.conv_relu, torch.ops.fastunet.conv_relu_pool):
        torch.library.opcheck(operator, (*tensors, 1, arguments["skip"]))


def test_compiled_code_follows_the_switch() -> None:
    torch.use_deterministic_algorithms(False)
    arguments = inputs(Shape(1, 0, 32, 32, 20, 20, 0))
    compiled = torch.compile(fastunet.conv_relu, fullgraph=True, backend="aot_eager")
    for on in (True, False, True):
        fastunet.use_winograd(on)
        assert torch.equal(compiled(**arguments), fastunet.conv_relu(**arguments))


def test_switch() -> None:
    arguments = inputs(Shape(1, 0, 32, 32, 20, 20, 0))
    by_winograd = fastunet.conv_relu(**arguments)
    assert fastunet.use_winograd(False)
    assert not fastunet.use_winograd(False)
    plain = fastunet.conv_relu(**arguments)
    assert not torch.equal(plain, by_winograd)
    assert winograd_rule.why_not_here() == "it is switched off"
    setting: Any = "off"
    with pytest.raises(TypeError, match="on must be True or False, got 'off'"):
        fastunet.use_winograd(setting)


def test_weights_are_never_stale() -> None:
    arguments = inputs(Shape(1, 0, 16, 16, 12, 12, 0))
    fastunet.conv_relu(**arguments)
    arguments["weight"].data.mul_(-1)
    exact = exact_convolution(arguments)
    assert_within_winograd(fastunet.conv_relu(**arguments), exact.relu(), max_abs(exact))


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: Shape) -> None:
    arguments = inputs(shape)
    leaves = {
        name: value.requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = fastunet.conv_relu(**arguments)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("padding", [0, 1])
def test_nan_stays_and_goes_no_further_than_its_tiles(bad: float, padding: int) -> None:
    arguments = inputs(Shape(1, 0, 20, 24, 19, 23, padding))
    clean, clean_pooled = fastunet.conv_relu(**arguments, pool=True)
    arguments["x"][0, 3, 9, 10] = bad
    y, pooled = fastunet.conv_relu(**arguments, pool=True)
    plain = eager.conv_relu(**arguments)
    # a tile reads the 6x6 inputs from its corner on
    tile = winograd_rule.TILE
    reads = torch.zeros_like(y[0, 0], dtype=torch.bool)
    for i in range(0, y.shape[2], tile):
        for j in range(0, y.shape[3], tile):
            rows, columns = (9 + padding - i, 10 + padding - j)
            reads[i : i + tile, j : j + tile] = 0 <= rows < tile + 2 and 0 <= columns < tile + 2
    assert torch.equal(y[..., ~reads], clean[..., ~reads])
    assert not y[~plain.isfinite()].isfinite().any()
    untouched = ~torch.max_pool2d(reads[None].float(), 2)[0].bool()
    assert torch.equal(pooled[..., untouched], clean_pooled[..., untouched])
    assert pooled[..., ~untouched].isnan().any()


@pytest.mark.parametrize("shape", [*LARGE, Shape(1, 0, 512, 512, 60, 60, 1)], ids=str)
def test_memory_is_bounded(shape: Shape) -> None:
    torch.use_deterministic_algorithms(False)
    arguments = inputs(shape)
    x, weight, skip = (arguments[name] for name in ("x", "weight", "skip"))
    y = torch.ops.fastunet.winograd_conv_relu(x, weight, None, shape.padding, skip, False)[0]
    grad = torch.randn_like(y).permute(0, 3, 1, 2)
    ops = torch.ops.fastunet
    has_skip = skip is not None
    calls = {
        "forward": lambda: ops.winograd_conv_relu(x, weight, None, shape.padding, skip, True),
        "images": lambda: ops.winograd_grad_images(
            grad, weight, shape.padding, x, skip, True, has_skip, True
        ),
        "weights": lambda: ops.winograd_grad_weight(grad, x, skip, shape.padding, True),
    }
    for name, call in calls.items():
        with torch.profiler.profile(profile_memory=True) as profile:
            results = call()
        events = profile.profiler.kineto_results.events()
        taken = sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")
        kept = sum(result.nbytes for result in results)
        assert kept < taken <= kept + 64_000_000 + 4096, name


def test_rule_is_what_was_measured() -> None:
    """Times of oneDNN over Winograd's, padding 1, one run on an Intel Xeon with AVX-512."""
    paying = chosen = 0
    with (Path(__file__).parent / "winograd_measured.csv").open() as file:
        for row in csv.DictReader(file):
            b, inputs, outputs, size = (
                int(row[name]) for name in ("batch", "inputs", "outputs", "size")
            )
            images = (b, size, size)
            weight = torch.empty(outputs, inputs, 3, 3, device="meta")
            for kind in KINDS:
                task = winograd_rule.work(kind, images, weight, 1)
                ratio = float(row[kind])
                if RULE(kind, task):
                    assert ratio >= 1, (kind, row)
                    chosen += ratio > 1.2
                # with fewer channels a layer takes microseconds
                paying += ratio > 1.2 and min(inputs, outputs) >= 32
    assert chosen > 0.75 * paying


def test_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(Shape(1, 0, 16, 16, 12, 12, 0))
    x, weight = arguments["x"], arguments["weight"]

    def why(kind: winograd_rule.Kind, x: Tensor = x, weight: Tensor = weight) -> str | None:
        return winograd_rule.unsupported(kind, x, weight, 0)

    many = torch.empty(1, winograd_rule.MOST_CHANNELS + 1, 3, 3)
    before = torch.get_float32_matmul_precision()
    for kind in KINDS:
        assert why(kind) is None
        assert why(kind, x=x.bfloat16()) == "torch.bfloat16 is not float32"
        assert why(kind, weight=many) == "more than 4096 channels"
        try:
            torch.set_float32_matmul_precision("medium")
            assert why(kind) == "less than float32 is allowed"
        finally:
            torch.set_float32_matmul_precision(before)
        with monkeypatch.context() as context:
            context.setattr(winograd_rule, "pays", RULE)
            assert why(kind) == "oneDNN is faster"
    with pytest.raises(RuntimeError, match="images must be float32 in channels_last"):
        torch.ops.fastunet.winograd_conv_relu(x.contiguous(), weight, None, 0, None, False)


def test_check_can_fail() -> None:
    """A tap that is off by 1e-4 of itself; test_winograd_transforms.py changes the transforms."""
    arguments = inputs(Shape(1, 0, 64, 64, 20, 20, 0))
    exact = exact_convolution(arguments)
    arguments["weight"][:, :, 1, 1] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="is above"):
        assert_within_winograd(fastunet.conv_relu(**arguments), exact.relu(), max_abs(exact))
