"""weighted_cross_entropy on what nobody should give it: an error or PyTorch's result."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastunet
from fastunet.backends import EXTENSION_MISSING

from .cross_entropy import inputs

FORWARD = torch.ops.fastunet.weighted_cross_entropy
BACKWARD = torch.ops.fastunet.weighted_cross_entropy_bwd
needs_extension = pytest.mark.skipif(bool(EXTENSION_MISSING), reason=EXTENSION_MISSING or "never")


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


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [
        (torch.int64, 2),
        (torch.int64, -1),
        (torch.int64, 2**32),
        (torch.int32, -101),
        (torch.uint8, 255),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_target_out_of_range(dtype: torch.dtype, outside: int, size: int) -> None:
    target = torch.zeros(2, size, size, dtype=dtype)
    target[1, size // 2, size // 2] = outside
    for requires_grad in (False, True):
        logits = torch.zeros(2, 2, size, size, requires_grad=requires_grad)
        with pytest.raises(IndexError, match=rf"[tT]arget {outside} is out of bounds"):
            fastunet.weighted_cross_entropy(logits, target)
    fastunet.weighted_cross_entropy(logits, target, ignore_index=outside)


@needs_extension
def test_operators_check_what_python_checks() -> None:
    """Who calls the operator and not the function gets an error, or a gradient of nothing."""
    logits, target = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
    one = torch.ones(())
    cases: list[tuple[str, tuple[Any, ...]]] = [
        (r"logits must be \[B, K, ...\] of at least one class", (logits[:, :0], target)),
        (r"logits must be \[B, K, ...\]", (logits[0, 0, 0], target)),
        ("logits must be floating point", (logits.long(), target)),
        ("target must be int64, int32 or uint8", (logits, target.float())),
        ("target must have 40 elements on the CPU", (logits, target[:1])),
        ("pixel_weight must have 40 elements", (logits, target, torch.ones(2, 4))),
        ("class_weight must have 3 elements", (logits, target, None, torch.ones(2))),
    ]
    for message, tensors in cases:
        arguments = (*tensors, *(None,) * (4 - len(tensors)), -100, 0.0)
        with pytest.raises(RuntimeError, match=f"weighted_cross_entropy: {message}"):
            FORWARD(*arguments, "mean", False)
        with pytest.raises(RuntimeError, match=f"weighted_cross_entropy: {message}"):
            BACKWARD(one, one, *arguments)
    rest = (logits, target, None, None, -100, 0.0)
    with pytest.raises(RuntimeError, match="grad_loss must have 40 elements"):
        BACKWARD(torch.ones(3), one, *rest)
    with pytest.raises(RuntimeError, match="divisor must have 1 elements"):
        BACKWARD(one, torch.ones(3), *rest)
    outside = torch.full_like(target, 7)
    assert not BACKWARD(one, one, logits, outside, None, None, -100, 0.0).any()


@needs_extension
def test_numbers_without_checks() -> None:
    """NaN and infinities given to the operator itself end, and no reduction is a mean."""
    arguments = inputs((2, 3, 4, 5), torch.float32, "cpu")
    for bad in (torch.nan, torch.inf, -torch.inf, -1.0, 1e300):
        assert FORWARD(*arguments.values(), -100, bad, "?", True)[0].shape == ()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 1), (2, 3, 1, 1, 1, 0)])
def test_nothing(shape: tuple[int, ...], device: torch.device) -> None:
    arguments = inputs(shape, torch.float32, device)
    logits = arguments.pop("logits").requires_grad_()
    assert fastunet.weighted_cross_entropy(logits, **arguments, reduction="none").numel() == 0
    loss = fastunet.weighted_cross_entropy(logits, **arguments, reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == shape
    assert fastunet.weighted_cross_entropy(logits, **arguments).isnan()
