"""``fastunet.accelerate`` on the U-Nets that people use: same results, and every swap reported."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastunet
from fastunet import accelerate, fusion

from . import networks, networks_more
from .accuracy import assert_as_accurate

Build = Callable[[], nn.Module]


def monai(name: str, **options: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    options = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, **options}
    return getattr(nets, name)(**options)


BASIC = {"features": (8, 8, 16, 32, 64, 8)}
LEVELS = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}
RELU = {"act": "relu", "norm": "batch"}
# how to build it, a size that it takes, and its swapped and kept convolutions
NETWORKS: dict[str, tuple[Build, tuple[int, int], int, int]] = {
    "classic": (lambda: networks.ClassicUNet(3, 2, width=8), (45, 67), 18, 1),
    "classic bilinear": (lambda: networks.ClassicUNet(3, 2, True, width=8), (45, 67), 18, 1),
    "path": (lambda: networks.PathUNet(3, 2, 3, 3), (61, 67), 10, 1),
    "path norm": (lambda: networks.PathUNet(3, 2, 3, 3, True, True, "upsample"), (45, 67), 10, 3),
    "hub": (lambda: networks.HubUNet(3, 1, 8), (48, 80), 18, 1),
    "monai basic": (lambda: monai("BasicUNet", **BASIC, **RELU), (45, 67), 18, 1),
    "monai": (lambda: monai("UNet", **LEVELS, **RELU), (44, 68), 5, 5),
    "segmentation": (lambda: networks_more.SegmentationUnet(3, 2, 8), (32, 96), 23, 24),
    "nested": (lambda: networks_more.NestedUNet(2, 3, width=8), (48, 80), 30, 1),
    "nested deep": (lambda: networks_more.NestedUNet(2, 3, True, width=8), (48, 80), 30, 4),
    "attention": (lambda: networks_more.AttentionUNet(3, 2, width=8), (48, 80), 22, 13),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network with statistics and biases that matter, in training mode, and an image."""
    make, size, *_ = NETWORKS[name]
    return randomised(make()), torch.randn(2, 3, *size)


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


def assert_same(model: nn.Module, original: nn.Module, x: Tensor, **modes: Any) -> None:
    """Outputs, gradients and buffers of ``model`` are as accurate as those of ``original``."""
    exact_model = copy.deepcopy(original).double()
    grad: Any = None
    seen = []
    for each, image in ((model, x), (original, x), (exact_model, x.double())):
        image = image.detach().requires_grad_()
        results = outputs(each(image))
        if grad is None:
            grad = [torch.randn_like(result) for result in results]
        each.zero_grad()
        torch.autograd.backward(results, [g.to(r.dtype) for g, r in zip(grad, results, strict=True)])
        tensors = {f"output {i}": result for i, result in enumerate(results)}
        tensors |= {"grad of the image": image.grad}  # type: ignore[dict-item]
        tensors |= {f"grad of {key}": p.grad for key, p in each.named_parameters()}  # type: ignore[misc]
        tensors |= {k: b for k, b in each.named_buffers() if b.is_floating_point()}
        seen.append(tensors)
    actual, eager, exact = seen
    assert actual.keys() == eager.keys()
    for key, tensor in actual.items():
        try:
            assert_as_accurate(tensor, eager[key], exact[key])
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


@every_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_results(name: str, training: bool) -> None:
    original, x = build(name)
    original.train(training)
    model, _ = accelerate(copy.deepcopy(original))
    assert_same(model, original, x)
