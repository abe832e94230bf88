"""What "as accurate as PyTorch" means: no tolerance is typed by hand."""

from collections.abc import Callable

import torch
from torch import Tensor


def max_abs(tensor: Tensor) -> float:
    """The largest magnitude; 0 for no elements."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def root_sum_square(tensor: Tensor) -> float:
    """The size of all elements together: for many of them, of which the worst is chance."""
    return float(tensor.detach().double().norm())


def assert_as_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, size: Callable[[Tensor], float] = max_abs
) -> None:
    """``actual`` may be twice as far from float64's result as eager PyTorch, plus a rounding."""
    assert actual.shape == eager.shape == exact.shape
    assert actual.dtype == eager.dtype
    assert exact.dtype == torch.float64
    error, eager_error = (size(t.double() - exact) for t in (actual, eager))
    bound = 2 * (eager_error + torch.finfo(eager.dtype).eps * size(exact))
    assert error <= bound, f"error {error:.3g} is above {bound:.3g}, eager has {eager_error:.3g}"


# Winograd's transforms round sums of larger numbers than the plain convolution has: with the points
# that we use, by up to 3e-6 of the largest result for 1024 channels. Twice what eager has, a few
# times 1e-7, would be asking for the plain convolution. So its bound is the one that README states,
# and all tests that ask for more switch Winograd off.
WINOGRAD_ERROR = 5e-6


def assert_within_winograd(actual: Tensor, exact: Tensor, size: float | None = None) -> None:
    """``actual`` may be off by ``WINOGRAD_ERROR`` of the largest result, or of ``size``."""
    assert actual.shape == exact.shape
    assert actual.dtype == torch.float32
    assert exact.dtype == torch.float64
    error, bound = max_abs(actual.double() - exact), WINOGRAD_ERROR * (size or max_abs(exact))
    assert error <= bound, f"error {error:.3g} is above {bound:.3g}"
