"""weighted_cross_entropy against torch.nn.functional.cross_entropy and float64."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
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
from fastunet.ops.weighted_cross_entropy.reference import (
    weighted_cross_entropy_bwd_reference,
    weighted_cross_entropy_reference,
)

from ..accuracy import assert_as_accurate
from .cross_entropy import (
    DTYPES,
    REDUCTIONS,
    as_exact,
    by,
    check,
    in_float32,
    inputs,
    loss_and_gradient,
    random_inputs,
)

# whoever serves the device, and the fallback of all devices
SERVERS = {
    "registered": fastunet.weighted_cross_entropy,
    "reference": by(weighted_cross_entropy_reference, weighted_cross_entropy_bwd_reference),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 68, 68), (2, 5, 7, 3), (3, 1, 2, 2), (2, 300, 4, 4)])
@pytest.mark.parametrize("server", SERVERS)
def test_forward_and_backward(
    server: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    reduction: str,
    device: torch.device,
) -> None:
    arguments = inputs(shape, dtype, device) | {"reduction": reduction}
    for smoothing in (0.0, 0.1):
        check(arguments | {"label_smoothing": smoothing}, SERVERS[server])


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
    check(random_inputs(data, DTYPES, 20))


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_reference(data: st.DataObject) -> None:
    check(random_inputs(data, DTYPES, 20), SERVERS["reference"])


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
    # PyTorch's own sum on a GPU is not
    torch.use_deterministic_algorithms(False)
    want = F.cross_entropy(arguments["logits"], arguments["target"], weight, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target_type", [torch.int64, torch.int32, torch.uint8])
def test_target_types(target_type: torch.dtype, device: torch.device) -> None:
    arguments = inputs((2, 4, 6, 5), torch.float32, device, ignored=0.0)
    want = fastunet.weighted_cross_entropy(**arguments)
    arguments["target"] = arguments["target"].to(target_type)
    assert torch.equal(fastunet.weighted_cross_entropy(**arguments), want)


def test_takes_no_more_memory_than_the_gradient(tmp_path: Path) -> None:
    arguments = inputs((2, 5, 200, 200), torch.float32, "cpu")
    logits = arguments.pop("logits").requires_grad_()

    def run() -> None:
        loss = fastunet.weighted_cross_entropy(logits, **arguments)
        torch.autograd.grad(loss, logits)

    assert peak_bytes(run, tmp_path / "ours.json") <= logits.nbytes + 1024
    # the measure sees what eager keeps
    arguments["target"].clamp_(0)
    eagerly = partial(eager.weighted_cross_entropy, logits, **arguments)
    assert peak_bytes(eagerly, tmp_path / "eager.json") > logits.nbytes


def peak_bytes(call: Callable[[], Any], trace: Path) -> int:
    """The most that the CPU's tensors took at once in ``call``, above what was there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        before = torch.empty(1)
        call()
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    totals = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(totals) - totals[0] + before.nbytes


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


@pytest.mark.parametrize("server", SERVERS)
def test_expanded_gradient(server: str, device: torch.device) -> None:
    """The sum of "none" sends back one number, expanded."""
    arguments = inputs((2, 3, 8, 7), torch.float32, device)
    logits = arguments.pop("logits").requires_grad_()
    grads = [
        torch.autograd.grad(SERVERS[server](logits, **arguments, reduction=reduction).sum(), logits)
        for reduction in ("none", "sum")
    ]
    torch.testing.assert_close(*grads)


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


def test_transforms(device: torch.device) -> None:
    """vmap runs the operator once an item; torch.func.grad is refused."""
    arguments = [torch.stack([t] * 3) for t in inputs((1, 3, 5, 4), torch.float32, device).values()]

    def call(logits: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        return fastunet.weighted_cross_entropy(logits, target, weights[0], class_weight=weights[1])

    want = torch.stack([call(*item) for item in zip(*arguments, strict=True)])
    assert torch.equal(torch.vmap(call)(*arguments), want)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(call)(*(t[0] for t in arguments))
    logits = arguments[0][0].requires_grad_()
    loss = call(logits, *(t[0] for t in arguments[1:]))
    one, two = torch.autograd.grad(
        loss, logits, torch.tensor([1.0, 2.0], device=device), is_grads_batched=True
    )[0]
    torch.testing.assert_close(two, 2 * one)


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
