"""``python -m benchmarks.accelerated``, in a checkout: how much faster others' networks become.

Prints a table of ratios, the times of the original and of the original in channels_last over that
of the accelerated model. The networks are those of the tests, which hold the results to the
original's accuracy, in the sizes that their authors gave them.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import fastunet
from tests import networks, networks_more
from tests.accelerate_cases import LEVELS, RELU, monai, outputs

from .timing import Clock, Effort, interleave

SIZE = 256
LARGE = {**LEVELS, "channels": (32, 64, 128, 256, 512), "strides": (2, 2, 2, 2)}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "(n_channels, n_classes, bilinear=False)": lambda: networks.ClassicUNet(3, 2),
    "the same, bilinear": lambda: networks.ClassicUNet(3, 2, True),
    "(in_channels, n_classes, depth, wf, ...), no normalisation": (
        lambda: networks.PathUNet(3, 2, 5, 6, True)
    ),
    'the same with batch_norm and up_mode="upsample"': (
        lambda: networks.PathUNet(3, 2, 5, 6, True, True, "upsample")
    ),
    "torch.hub's (in_channels, out_channels, init_features)": lambda: networks.HubUNet(3, 1),
    "U-Net++": lambda: networks_more.NestedUNet(2, 3),
    "attention U-Net": lambda: networks_more.AttentionUNet(3, 2),
    "segmentation_models_pytorch's `Unet`, ResNet-34": (
        lambda: networks_more.SegmentationUnet(3, 2)
    ),
    "nnU-Net's, instance norm and LeakyReLU": lambda: networks_more.PlainConvUNet(3, 2),
    "MONAI `BasicUNet`, instance norm and LeakyReLU": lambda: monai("BasicUNet"),
    "MONAI `BasicUNet`, batch norm and ReLU": lambda: monai("BasicUNet", **RELU),
    "MONAI `UNet`, instance norm and PReLU, residual units": lambda: monai("UNet", **LARGE),
    "MONAI `UNet`, batch norm and ReLU, residual units": lambda: monai("UNet", **LARGE, **RELU),
}


def main(
    only: Annotated[str, typer.Option(help="Networks whose name has this in it.")] = "",
    seconds: Annotated[float, typer.Option(help="To measure each number.")] = 6.0,
) -> None:
    """Time each network in prediction and in training, in float32 and under bfloat16 autocast."""
    kinds = [(training, bf16) for training in (False, True) for bf16 in (False, True)]
    heads = [f"{('prediction', 'training')[t]}, {('float32', 'bf16')[b]}" for t, b in kinds]
    typer.echo(f"| network | swapped | {' | '.join(heads)} |")
    typer.echo("|" + " --- |" * (2 + len(kinds)))
    for name, build in NETWORKS.items():
        if only not in name:
            continue
        torch.manual_seed(0)
        original = build()
        model, report = fastunet.accelerate(copy.deepcopy(original))
        in_order: Any = copy.deepcopy(original)
        in_order.to(memory_format=torch.channels_last)
        x = torch.randn(1, 3, SIZE, SIZE)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        subjects = [(original, x), (model, x), (in_order, channels_last)]
        swapped = len(report.swapped) + len(report.on_cpu)
        cells = [name, f"{swapped} of {swapped + len(report.kept)}"]
        for training, bf16 in kinds:
            calls = [partial(_run, each.train(training), given, bf16) for each, given in subjects]
            effort = Effort(seconds=seconds, fewest=5, most=50)
            times = np.median(interleave(calls, [Clock(x.device)] * len(calls), effort), axis=1)
            cells.append(f"{times[0] / times[1]:.2f} / {times[2] / times[1]:.2f}")
        typer.echo(f"| {' | '.join(cells)} |")


def _run(model: nn.Module, x: Tensor, bf16: bool) -> None:
    """A prediction, or the forward and backward of a step."""
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with cast, torch.set_grad_enabled(model.training):
        results = outputs(model(x))
    if model.training:
        torch.autograd.backward([y.float().square().mean() for y in results])
        model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    typer.run(main)
