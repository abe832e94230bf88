"""Arguments of weighted_cross_entropy, and what its results are held against."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

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


def by(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Tensor]:
    """weighted_cross_entropy by functions that are not the registered ones."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, reduction: str, *arguments: Any) -> Tensor:
            loss, divisor, _ = forward(*arguments, reduction, False)
            ctx.arguments = (divisor, *arguments)
            return loss

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None, backward(*grads, *ctx.arguments), *(None,) * 5)

    def operator(
        logits: Tensor,
        target: Tensor,
        pixel_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        arguments = (logits, target, pixel_weight, class_weight, ignore_index, label_smoothing)
        return Function.apply(reduction, *arguments)

    return operator


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


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "classes of more": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "sliced": lambda t: F.pad(t, (1, 2, 3, 0))[..., 3:, 1:-2],
}


def random_inputs(data: st.DataObject, dtypes: list[torch.dtype], most: int) -> dict[str, Any]:
    """Arguments of weighted_cross_entropy, with enough pixels that eager's error is not luck."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shape = data.draw(st.tuples(*(st.integers(1, n) for n in (3, 9)), *[st.integers(5, most)] * 2))
    dtype = data.draw(st.sampled_from(dtypes))
    arguments = inputs(shape, dtype, "cpu", ignored=data.draw(st.sampled_from([0.0, 0.1, 0.5])))
    spread = data.draw(st.sampled_from([0.1, 1.0, 10.0, 1e3]))
    logits = (arguments["logits"].double() * spread).to(dtype)
    arguments["logits"] = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](logits)
    # "mean" of nothing is undefined
    arguments["target"][:, 0, 0] = 0
    arguments |= dict.fromkeys(
        data.draw(st.sets(st.sampled_from(["pixel_weight", "class_weight"])))
    )
    ignore_index = data.draw(st.sampled_from([-100, 255, shape[1]]))
    arguments["target"][arguments["target"] == -100] = ignore_index
    types = [torch.int64, torch.int32] + [torch.uint8] * (ignore_index >= 0)
    arguments["target"] = arguments["target"].to(data.draw(st.sampled_from(types)))
    return arguments | {
        "ignore_index": ignore_index,
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
    }
