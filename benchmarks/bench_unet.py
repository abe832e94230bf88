"""The whole network: prediction, and a training step from images to updated weights."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastunet import UNet, ops
from fastunet.devices import autocast
from fastunet.unet import PAPER_WIDTHS

from .cases import (
    EAGER_LAYOUTS,
    MEMORY_FORMATS,
    OURS,
    Call,
    Case,
    Contender,
    Inputs,
    Setting,
    noise,
    why_not_compiled,
)
from .figure import PAPER_SIZE, arrows

QUICK_WIDTHS = (16, 32, 64, 128, 256)


def cases(setting: Setting) -> list[Case]:
    """The paper's network, in quick mode with a quarter of its channels."""
    size = setting.network_size(quick=252, full=PAPER_SIZE)
    widths = QUICK_WIDTHS if setting.quick else PAPER_WIDTHS
    return [
        _case(size, widths, dtype, training, setting)
        for dtype in setting.dtypes
        for training in (False, True)
    ]


def _case(
    size: int, widths: tuple[int, ...], dtype: torch.dtype, training: bool, setting: Setting
) -> Case:
    batch = setting.batch or 1
    *inner, head = arrows(size, widths)

    def inputs() -> Inputs:
        shape = (batch, head.size, head.size)
        target = torch.randint(2, shape, generator=torch.Generator().manual_seed(0))
        return {
            "images": noise((batch, 1, size, size), setting.device, torch.float32, seed=1),
            "target": target.to(setting.device),
            "pixel_weight": 1 + noise(shape, setting.device, torch.float32, seed=2).square(),
        }

    def call(model: Any, given: Inputs, module: ModuleType, precision: torch.dtype) -> Call:
        if training:
            return train(model, given, module.weighted_cross_entropy, precision)
        return predict(model, given["images"], precision)

    def network(module: ModuleType, layout: str = "contiguous") -> Any:
        torch.manual_seed(0)
        # without dropout, so that all contenders compute the same
        model: Any = UNet(widths=widths, dropout=0.0, ops=module).train(training)
        return model.to(setting.device, memory_format=MEMORY_FORMATS[layout])

    def prepare(
        module: ModuleType, layout: str, compiled: bool = False
    ) -> Callable[[Inputs], Call]:
        def prepared(given: Inputs) -> Call:
            model = network(module, layout)
            if compiled:
                model = torch.compile(model, dynamic=False)
            images = given["images"].clone(memory_format=MEMORY_FORMATS[layout])
            return call(model, {**given, "images": images}, module, dtype)

        return prepared

    def exact(given: Inputs) -> tuple[Tensor, ...]:
        wide = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        return call(network(ops.eager).double(), wide, ops.eager, torch.float64)()

    forward_flops = sum(arrow.flops for arrow in (*inner, head))
    first = inner[0].flops
    return Case(
        operator="unet",
        name=f"{batch} x {widths[0]}..{widths[-1]} channels, {size}x{size}, "
        + ("training step" if training else "prediction"),
        dtype=dtype,
        inputs=inputs,
        exact=exact,
        contenders=(
            *(
                Contender(name, prepare(ops.eager, layout), layout, trusted=True)
                for name, layout in EAGER_LAYOUTS.items()
            ),
            Contender(
                "torch.compile",
                prepare(ops.eager, "channels_last", compiled=True),
                "channels_last",
                backend="inductor",
                skip=why_not_compiled(setting),
            ),
            Contender(OURS, prepare(ops, "channels_last"), "channels_last"),
        ),
        # the first convolution has no gradient of the image
        flops=batch * (3 * forward_flops - first if training else forward_flops),
    )


def predict(model: Callable[[Tensor], Tensor], images: Tensor, dtype: torch.dtype) -> Call:
    """The logits."""

    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode(), _precision(images.device, dtype):
            return (model(images),)

    return call


def train(model: Any, given: Inputs, loss_of: Callable[..., Tensor], dtype: torch.dtype) -> Call:
    """Zero the gradients, forward, loss, backward, update; returns the loss and the gradients.

    The learning rate is 0: all of the optimiser's traffic, and the same weights in each round.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.99)

    def call() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        with _precision(given["images"].device, dtype):
            loss = loss_of(model(given["images"]), given["target"], given["pixel_weight"])
        loss.backward()
        optimizer.step()
        return (loss.detach(), *(parameter.grad for parameter in parameters))

    return call


def _precision(device: torch.device, dtype: torch.dtype) -> Any:
    return autocast(device, dtype if dtype.itemsize < 4 else None)
