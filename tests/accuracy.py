"""What "as accurate as PyTorch" means: no tolerance is typed by hand."""

import torch
from torch import Tensor


def max_abs(tensor: Tensor) -> float:
    """The largest magnitude; 0 for no elements."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """``actual`` may be twice as far from float64's result as eager PyTorch, plus a rounding."""
    assert actual.shape == eager.shape == exact.shape
    assert actual.dtype == eager.dtype
    assert exact.dtype == torch.float64
    error, eager_error = (max_abs(t.double() - exact) for t in (actual, eager))
    bound = 2 * (eager_error + torch.finfo(eager.dtype).eps * max_abs(exact))
    assert error <= bound, f"error {error:.3g} is above {bound:.3g}, eager has {eager_error:.3g}"
