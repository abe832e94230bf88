"""What the tests of ``fastunet.accelerate`` share: small modules, and who equals whom."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .accuracy import assert_as_accurate, root_sum_square


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for name in ("weight", "running_var"):
                nn.init.uniform_(state[name], 0.5, 1.5)
            for name in ("bias", "running_mean"):
                nn.init.normal_(state[name], std=0.3)
    return model


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def gradients(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Outputs, all gradients of their weighted sum in one vector, and buffers."""
    x = x.detach().requires_grad_()
    results = outputs(model(x))
    generator = torch.Generator().manual_seed(0)
    weighted = [
        (result * torch.randn(result.shape, generator=generator).to(result)).sum()
        for result in results
    ]
    grads = torch.autograd.grad(sum(weighted, x.new_zeros(())), [x, *model.parameters()])
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return results, torch.cat([grad.flatten() for grad in grads]), buffers


def assert_same(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and buffers of ``model`` are as accurate as those of ``original``."""
    exact_model = copy.deepcopy(original).double()
    actual, eager, exact = (
        gradients(each, image)
        for each, image in ((model, x), (original, x), (exact_model, x.double()))
    )
    for which in (0, 2):
        for tensors in zip(actual[which], eager[which], exact[which], strict=True):
            assert_as_accurate(*tensors)
    assert_as_accurate(actual[1], eager[1], exact[1], root_sum_square)


def relu_conv(c: int = 4, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(c, c, 3, padding=1, **options), nn.ReLU()]


class Forward(nn.Module):
    """A convolution, normalisation, ReLU and pooling, joined by a function of them and x."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.flag = True
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)
