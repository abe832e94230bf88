"""weighted_cross_entropy against torch.nn.functional.cross_entropy and float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastunet
from fastunet.ops import eager

from ..accuracy import assert_as_accurate

REDUCTIONS = ["none", "sum", "mean", "weighted_mean"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, ignored: float = 0.1
) -> dict[str, Any]:
    b, k, *spatial = shape
    target = torch.randint(k, (b, *spatial), device=device)
    target[torch.rand(target.shape, device=device) < ignored] = -100
    return {
        "logits": (3 * torch.randn(shape, device=device)).to(dtype),
        "target": target,
        "pixel_weight": torch.rand(b, *spatial, device=device) * 10,
        "class_weight": torch.rand(k, device=device) + 0.5,
    }


def as_exact(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def loss_and_gradient(operator: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    logits = arguments["logits"].detach().clone().requires_grad_()
    loss = operator(**{**arguments, "logits": logits})
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))
    return loss, grad


def in_float32(**arguments: Any) -> Tensor:
    """Eager as it is used with half types: float32 arithmetic, rounded once."""
    dtype = arguments["logits"].dtype
    loss = eager.weighted_cross_entropy(**{**arguments, "logits": arguments["logits"].float()})
    return loss.to(dtype)


def check(arguments: dict[str, Any], operator: Any = fastunet.weighted_cross_entropy) -> None:
    got = loss_and_gradient(operator, arguments)
    plain = loss_and_gradient(in_float32, arguments)
    exact = loss_and_gradient(eager.weighted_cross_entropy, as_exact(arguments))
    for a, b, c in zip(got, plain, exact, strict=True):
        assert_as_accurate(a, b, c)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 68, 68), (2, 5, 7, 3), (3, 1, 2, 2), (2, 300, 4, 4)])
def test_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    check(inputs(shape, dtype, device) | {"reduction": reduction, "label_smoothing": 0.1})


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "classes of more": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "sliced": lambda t: F.pad(t, (1, 2, 3, 0))[..., 3:, 1:-2],
}


def random_inputs(draw: st.DrawFn, dtypes: list[torch.dtype], most: int) -> dict[str, Any]:
    """Arguments of weighted_cross_entropy, with enough pixels that eager's error is not luck."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.tuples(*(st.integers(1, n) for n in (3, 9)), *[st.integers(5, most)] * 2))
    dtype = draw(st.sampled_from(dtypes))
    arguments = inputs(shape, dtype, "cpu", ignored=draw(st.sampled_from([0.0, 0.1, 0.5])))
    spread = draw(st.sampled_from([0.0, 1.0, 10.0, 1e3]))
    logits = (arguments["logits"].double() * spread).to(dtype)
    arguments["logits"] = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](logits)
    # "mean" of nothing is undefined
    arguments["target"][:, 0, 0] = 0
    arguments |= dict.fromkeys(draw(st.sets(st.sampled_from(["pixel_weight", "class_weight"]))))
    ignore_index = draw(st.sampled_from([-100, 255, shape[1]]))
    arguments["target"][arguments["target"] == -100] = ignore_index
    types = [torch.int64, torch.int32] + [torch.uint8] * (ignore_index >= 0)
    arguments["target"] = arguments["target"].to(draw(st.sampled_from(types)))
    return arguments | {
        "ignore_index": ignore_index,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small problems are not worth the threads' waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=2000, deadline=None, derandomize=True)
@given(data=st.data())
def test_random(data: st.DataObject) -> None:
    check(random_inputs(data.draw, [*DTYPES, torch.float64], 20))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_cross_entropy(
    reduction: str, weighted: bool, smoothing: float, device: torch.device
) -> None:
    arguments = inputs((2, 4, 6, 5), torch.float32, device)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    weight = arguments["class_weight"] if weighted else None
    got = fastunet.weighted_cross_entropy(
        arguments["logits"], arguments["target"], class_weight=weight, **options
    )
    want = F.cross_entropy(arguments["logits"], arguments["target"], weight, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target_type", [torch.int64, torch.int32, torch.uint8])
def test_target_types(target_type: torch.dtype, device: torch.device) -> None:
    arguments = inputs((2, 4, 6, 5), torch.float32, device, ignored=0.0)
    want = fastunet.weighted_cross_entropy(**arguments)
    arguments["target"] = arguments["target"].to(target_type)
    assert torch.equal(fastunet.weighted_cross_entropy(**arguments), want)


def test_extreme_logits(device: torch.device) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [-torch.inf, 0.0]], device=device)
    logits = logits.T.reshape(1, 3, 1, 2)[:, [0, 1, 2]].clone().requires_grad_()
    target = torch.tensor([[[0, 0]]], device=device)
    loss = fastunet.weighted_cross_entropy(logits, target, reduction="none")
    want = F.cross_entropy(logits, target, reduction="none")
    assert torch.equal(loss, want)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(grad).all()
    bad = torch.full((1, 2, 1, 1), torch.nan, device=device)
    assert fastunet.weighted_cross_entropy(bad, target[:, :, :1]).isnan()


def test_nothing_counts(device: torch.device) -> None:
    logits = torch.randn(1, 2, 2, 2, device=device, requires_grad=True)
    target = torch.full((1, 2, 2), -100, device=device)
    assert fastunet.weighted_cross_entropy(logits, target).isnan()
    loss = fastunet.weighted_cross_entropy(logits, target, reduction="sum")
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_target_out_of_range() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        fastunet.weighted_cross_entropy(torch.zeros(1, 2, 1, 1), torch.tensor([[[2]]]))


def test_strides(device: torch.device) -> None:
    arguments = inputs((2, 4, 6, 5), torch.float32, device)
    want = loss_and_gradient(fastunet.weighted_cross_entropy, arguments)
    last = arguments | {"logits": arguments["logits"].to(memory_format=torch.channels_last)}
    sliced = arguments | {"target": torch.stack([arguments["target"]] * 2, -1)[..., 0]}
    for layout in (last, sliced):
        got = loss_and_gradient(fastunet.weighted_cross_entropy, layout)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_run_gives_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    """And on the CPU every number of threads."""
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3, 7):
        torch.manual_seed(0)
        arguments = inputs((3, 5, 200, 201), dtype, device) | {"reduction": "weighted_mean"}
        torch.set_num_threads(number)
        results.append(loss_and_gradient(fastunet.weighted_cross_entropy, arguments))
    torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_backward_again(device: torch.device) -> None:
    """A gradient that was computed ahead serves once more, and scaled, and is not overwritten."""
    arguments = inputs((2, 3, 8, 7), torch.float32, device)
    logits = arguments.pop("logits").requires_grad_()
    loss = fastunet.weighted_cross_entropy(logits, **arguments)
    first, second, tripled = (
        torch.autograd.grad(loss, logits, torch.full_like(loss, factor), retain_graph=True)[0]
        for factor in (1, 1, 3)
    )
    assert torch.equal(first, second)
    exact = loss_and_gradient(
        eager.weighted_cross_entropy, as_exact(arguments | {"logits": logits})
    )[1]
    assert_as_accurate(tripled, 3 * first, 6 * exact)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(logits.grad, 2 * first)
    loss = fastunet.weighted_cross_entropy(logits, **arguments)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    grad.zero_()
    if logits.device.type == "cpu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, logits)
    else:
        assert torch.equal(torch.autograd.grad(loss, logits)[0], second)


def test_loss_scaling_does_not_underflow(device: torch.device) -> None:
    """A gradient below float16's least number, until it is multiplied by the loss scale."""
    arguments = inputs((1, 2, 300, 300), torch.float16, device)
    arguments["pixel_weight"] = 1e-3 * arguments["pixel_weight"]
    scaled = {**arguments, "pixel_weight": 2.0**15 * arguments["pixel_weight"]}
    logits = arguments["logits"].clone().requires_grad_()
    loss = fastunet.weighted_cross_entropy(**{**arguments, "logits": logits})
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2.0**15))
    plain = loss_and_gradient(in_float32, scaled)[1]
    exact = loss_and_gradient(eager.weighted_cross_entropy, as_exact(scaled))[1]
    assert_as_accurate(grad, 2 * plain, 2 * exact)


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_no_gradient_that_nobody_wants(grad_enabled: bool, device: torch.device) -> None:
    """Neither in evaluation nor of logits that require none is one computed."""
    arguments = inputs((2, 3, 8, 7), torch.float32, device)
    arguments["logits"].requires_grad_(not grad_enabled)
    with torch.set_grad_enabled(grad_enabled), _Calls() as calls:
        fastunet.weighted_cross_entropy(**arguments)
    ((name, with_gradient),) = calls.seen
    assert name == "fastunet::weighted_cross_entropy"
    assert not with_gradient


class _Calls(TorchDispatchMode):
    """Notes fastunet's operators and their last argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fastunet":
            self.seen.append((func._schema.name, args[-1]))
        return func(*args, **(kwargs or {}))


def test_one_pass_on_the_cpu() -> None:
    """A plain backward() of float32 logits runs no backward operator; others run it."""
    arguments = inputs((2, 3, 8, 7), torch.float32, "cpu")
    for dtype, factor, count in ((torch.float32, 1, 1), (torch.float32, 2, 2), (torch.half, 1, 2)):
        logits = arguments["logits"].detach().to(dtype).requires_grad_()
        with _Calls() as calls:
            loss = fastunet.weighted_cross_entropy(**{**arguments, "logits": logits})
            loss.backward(torch.full_like(loss, factor))
        assert len(calls.seen) == count


def test_differentiates_once(device: torch.device) -> None:
    arguments = inputs((2, 3, 4, 4), torch.float64, device)
    logits = arguments.pop("logits").requires_grad_()
    loss = fastunet.weighted_cross_entropy(logits, **arguments)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_registration(reduction: str, device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    arguments = inputs((2, 3, 6, 5), torch.float64, device)
    logits = arguments.pop("logits").requires_grad_()
    target, pixel_weight, class_weight = arguments.values()
    options = (-100, 0.1, reduction)
    for with_gradient in (False, True):
        torch.library.opcheck(
            torch.ops.fastunet.weighted_cross_entropy,
            (logits, target, pixel_weight.double(), class_weight.double(), *options, with_gradient),
        )

    def call(logits: Tensor) -> Tensor:
        return fastunet.weighted_cross_entropy(
            logits, **arguments, label_smoothing=0.1, reduction=reduction
        )

    assert torch.autograd.gradcheck(call, (logits,))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), call(logits))
    for ours, plain in zip(
        *(torch.autograd.grad(f(logits).sum(), logits) for f in (compiled, call)), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_autocast() -> None:
    arguments = inputs((1, 2, 6, 6), torch.bfloat16, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastunet.weighted_cross_entropy(**arguments)
    want = fastunet.weighted_cross_entropy(**{**arguments, "logits": arguments["logits"].float()})
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)


def test_module(device: torch.device) -> None:
    arguments = inputs((1, 2, 6, 6), torch.float32, device)
    weight = arguments.pop("class_weight")
    loss = fastunet.WeightedCrossEntropyLoss(weight, reduction="weighted_mean")
    want = fastunet.weighted_cross_entropy(
        **arguments, class_weight=weight, reduction="weighted_mean"
    )
    assert torch.equal(loss(**arguments), want)
    assert not loss.state_dict()


def test_rejects() -> None:
    good = inputs((1, 3, 4, 4), torch.float32, "cpu")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"logits": "x"}, TypeError, "weighted_cross_entropy: logits must be a torch.Tensor"),
        ({"logits": torch.ones(1, 3, 4, 4).long()}, TypeError, "logits must be floating point"),
        ({"logits": torch.ones(3)}, ValueError, r"logits must be \[B, K, H, W\], got \[3\]"),
        ({"target": torch.ones(1, 4, 4)}, TypeError, "target must be int64, int32 or uint8"),
        ({"target": good["target"][:, :3]}, ValueError, r"target must be of shape \[1, 4, 4\]"),
        ({"pixel_weight": torch.ones(1, 1, 4, 4)}, ValueError, "pixel_weight must be of shape"),
        (
            {"pixel_weight": torch.ones(1, 4, 4, requires_grad=True)},
            TypeError,
            "pixel_weight must be detached",
        ),
        ({"class_weight": torch.ones(2)}, ValueError, r"class_weight must be of shape \[3\]"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be within 0..1, got 1.5"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            fastunet.weighted_cross_entropy(**{**good, **change})


def test_check_can_fail() -> None:
    arguments = inputs((1, 3, 8, 8), torch.float32, "cpu")
    exact = loss_and_gradient(eager.weighted_cross_entropy, as_exact(arguments))
    plain = loss_and_gradient(eager.weighted_cross_entropy, arguments)
    unweighted = loss_and_gradient(eager.weighted_cross_entropy, arguments | {"pixel_weight": None})
    for a, b, c in zip(unweighted, plain, exact, strict=True):
        with pytest.raises(AssertionError, match="is above"):
            assert_as_accurate(a, b, c)
