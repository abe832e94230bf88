"""The networks that ``accelerate`` is tested on, and what "the same results" means."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import networks, networks_more
from .accuracy import assert_as_accurate, root_sum_square

Build = Callable[[], nn.Module]

# images that are tried, and what a single flipped ReLU changes a gradient by, at least
IMAGES = 6
FLIPPED = 5e-5


def monai(name: str, **options: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    options = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, **options}
    return getattr(nets, name)(**options)


BASIC = {"features": (8, 8, 16, 32, 64, 8)}
LEVELS = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}
RELU = {"act": "relu", "norm": "batch"}
# how to build it, a size that it takes, and its convolutions: swapped, swapped on the CPU, kept
NETWORKS: dict[str, tuple[Build, tuple[int, int], int, int, int]] = {
    "classic": (lambda: networks.ClassicUNet(3, 2, width=8), (45, 67), 22, 0, 1),
    "classic bilinear": (lambda: networks.ClassicUNet(3, 2, True, width=8), (45, 67), 18, 0, 1),
    "path": (lambda: networks.PathUNet(3, 2, 3, 3), (61, 67), 12, 0, 1),
    "path norm": (
        lambda: networks.PathUNet(3, 2, 3, 3, True, True, "upsample"), (45, 67), 10, 0, 3
    ),
    "hub": (lambda: networks.HubUNet(3, 1, 8), (48, 80), 22, 0, 1),
    "monai basic": (lambda: monai("BasicUNet", **BASIC, **RELU), (45, 67), 22, 0, 1),
    "monai basic default": (lambda: monai("BasicUNet", **BASIC), (45, 67), 0, 22, 1),
    "monai": (lambda: monai("UNet", **LEVELS, **RELU), (44, 68), 5, 1, 7),
    "monai default": (lambda: monai("UNet", **LEVELS), (44, 68), 0, 6, 7),
    "plain": (lambda: networks_more.PlainConvUNet(3, 2, (8, 16, 32)), (44, 68), 0, 10, 3),
    "segmentation": (lambda: networks_more.SegmentationUnet(3, 2, 8), (32, 96), 23, 17, 7),
    "nested": (lambda: networks_more.NestedUNet(2, 3, width=8), (48, 80), 30, 0, 1),
    "nested deep": (lambda: networks_more.NestedUNet(2, 3, True, width=8), (48, 80), 30, 0, 4),
    "attention": (lambda: networks_more.AttentionUNet(3, 2, width=8), (48, 80), 22, 0, 13),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network with statistics and biases that matter, in training mode, and an image."""
    make, size, *_ = NETWORKS[name]
    return randomised(make()), torch.randn(2, 3, *size)


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            state = module.state_dict()
            for name, tensor in state.items():
                if name in ("weight", "running_var"):
                    nn.init.uniform_(tensor, 0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    nn.init.normal_(tensor, std=0.3)
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
    total, leaves = sum(weighted, x.new_zeros(())), [x, *model.parameters()]
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return results, torch.cat([grad.flatten() for grad in grads]), buffers


def assert_same(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and buffers of ``model`` are as accurate as those of ``original``.

    Gradients for one of several images: those of a ReLU whose input is as good as zero go either
    way, which happens to either network in every second image if there are many.
    """
    for image in (x, *(torch.randn_like(x) for _ in range(IMAGES - 1))):
        exact_model = copy.deepcopy(original).double()
        actual, eager, exact = (
            gradients(each, given)
            for each, given in ((model, image), (original, image), (exact_model, image.double()))
        )
        for which in (0, 2):
            for tensors in zip(actual[which], eager[which], exact[which], strict=True):
                assert_as_accurate(*tensors)
        if root_sum_square(actual[1] - exact[1]) < FLIPPED * root_sum_square(exact[1]):
            break
    assert_as_accurate(actual[1], eager[1], exact[1], root_sum_square)
