"""The whole network: prediction, and a training step from images to updated weights."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from fastunet import UNet, graphs, ops
from fastunet.devices import autocast
from fastunet.unet import PAPER_WIDTHS

from .cases import (
    EAGER_LAYOUTS,
    MEMORY_FORMATS,
    OURS,
    RECORDED,
    Call,
    Case,
    Contender,
    Inputs,
    Prepare,
    Setting,
    Shape,
    compilations,
    noise,
    why_no_gpu,
)
from .exported import engines
from .figure import PAPER_SIZE, arrows

QUICK_WIDTHS = (16, 32, 64, 128, 256)
# batch and size: the paper's, then what people use
SIZES = (PAPER_SIZE, 256, 512, 1024)
GPU_SHAPES = tuple(product((1, 16, 4), SIZES))
# what takes minutes a contender on two cores is left to those who ask for it
CPU_SHAPES = {
    False: (*product((1,), SIZES), (4, 256), (16, 256)),
    True: (*product((1,), SIZES[:3]), (4, 256)),
}
# one image, as float64 goes through them one by one
NORMALISED_SHAPES = ((1, PAPER_SIZE), (1, 256))


def cases(setting: Setting) -> list[Case]:
    """The paper's network, in quick mode with a quarter of its channels.

    Its training also with batch normalisation, as most followers have it.
    """
    on_cpu = setting.device.type == "cpu"
    kinds: list[tuple[bool, Literal["batch"] | None, Sequence[Shape]]] = [
        (training, None, CPU_SHAPES[training] if on_cpu else GPU_SHAPES)
        for training in (False, True)
    ]
    if not setting.quick:
        kinds.append((True, "batch", NORMALISED_SHAPES))
    return [
        _case(batch, size, dtype, training, norm, setting)
        for training, norm, full in kinds
        for batch, size in setting.network_shapes(full=full, quick=[(1, 252)])
        for dtype in setting.dtypes
        if norm is None or batch == 1
    ]


def _case(
    batch: int,
    size: int,
    dtype: torch.dtype,
    training: bool,
    norm: Literal["batch"] | None,
    setting: Setting,
) -> Case:
    widths = QUICK_WIDTHS if setting.quick else PAPER_WIDTHS
    *inner, head = arrows(size, widths)

    def inputs() -> Inputs:
        shape = (batch, head.size, head.size)
        target = torch.randint(2, shape, generator=torch.Generator().manual_seed(0))
        return {
            "images": noise((batch, 1, size, size), setting.device, torch.float32, seed=1),
            "target": target.to(setting.device),
            "pixel_weight": 1 + noise(shape, setting.device, torch.float32, seed=2).square(),
        }

    def network(module: ModuleType, layout: str = "contiguous") -> Any:
        torch.manual_seed(0)
        # without dropout, so that all contenders compute the same
        model: Any = UNet(widths=widths, dropout=0.0, norm=norm, ops=module).train(training)
        return model.to(setting.device, memory_format=MEMORY_FORMATS[layout])

    def calls(
        model: Any, sets: Sequence[Inputs], module: ModuleType, precision: torch.dtype
    ) -> Sequence[Call]:
        if training:
            return train(model, sets, module.weighted_cross_entropy, precision)
        return [predict(model, given["images"].to(precision)) for given in sets]

    def prepare(
        module: ModuleType, layout: str, transform: Callable[[Any], Any] = lambda model: model
    ) -> Prepare:
        """``transform`` gets the model as it is trained, or as the engines take it, converted."""

        def prepared(sets: Sequence[Inputs]) -> Sequence[Call]:
            own = [
                {**given, "images": given["images"].clone(memory_format=MEMORY_FORMATS[layout])}
                for given in sets
            ]
            model = network(module, layout)
            model = transform(model if training else model.to(dtype))
            return calls(model, own, module, dtype)

        return prepared

    def compiled(mode: str | None) -> Prepare:
        return prepare(ops.eager, "channels_last", partial(torch.compile, dynamic=False, mode=mode))

    def recorded(model: Any) -> Any:
        if not training:
            return graphs.Recorded(model)
        shape, layout = (batch, 1, size, size), torch.channels_last
        image = torch.empty(shape, device=setting.device, memory_format=layout)
        return graphs.recorded_for_training(model, image, _below_float32(dtype))

    def frozen(model: Any) -> Any:
        return torch.compile(model, dynamic=False, options={"freezing": True})

    def exact(given: Inputs) -> tuple[Tensor, ...]:
        """Image by image, since float64 takes memory; the loss is the mean over the images."""
        model = network(ops.eager).double()
        alone = []
        for i in range(batch):
            image = {
                name: (t.double() if t.is_floating_point() else t)[i : i + 1]
                for name, t in given.items()
            }
            (call,) = calls(model, [image], ops.eager, torch.float64)
            alone.append([result.clone() for result in call()])
        if training:
            return tuple(torch.stack(results).mean(0) for results in zip(*alone, strict=True))
        return (torch.cat([logits for (logits,) in alone]),)

    forward_flops = sum(arrow.flops for arrow in (*inner, head))
    first = inner[0].flops
    only_prediction = "it has no gradient" if training else None
    return Case(
        operator="unet",
        name=f"{batch} x {widths[0]}..{widths[-1]} channels"
        + (" with batch norm" if norm else "")
        + f", {size}x{size}, "
        + ("training step" if training else "prediction"),
        dtype=dtype,
        inputs=inputs,
        exact=exact,
        contenders=(
            *(
                Contender(name, prepare(ops.eager, layout), layout, trusted=True)
                for name, layout in EAGER_LAYOUTS.items()
            ),
            *compilations(compiled, setting),
            Contender(
                "torch.compile freezing",
                prepare(ops.eager, "channels_last", frozen),
                "channels_last",
                backend="inductor",
                skip=only_prediction or _why_not_frozen(setting),
            ),
            *(() if training else engines(partial(network, ops.eager), dtype, setting)),
            Contender(OURS, prepare(ops, "channels_last"), "channels_last"),
            Contender(
                RECORDED,
                prepare(ops, "channels_last", recorded),
                "channels_last",
                backend="CUDA graph",
                skip=why_no_gpu(setting),
            ),
        ),
        # the first convolution has no gradient of the image
        flops=batch * (3 * forward_flops - first if training else forward_flops),
        launches_count=True,
    )


def predict(model: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    """The logits."""

    def call() -> tuple[Tensor, ...]:
        # torch.compile freezes weights without gradients, but not in inference mode
        with torch.no_grad():
            return (model(images),)

    return call


def train(
    model: Any, sets: Sequence[Inputs], loss_of: Callable[..., Tensor], dtype: torch.dtype
) -> list[Call]:
    """Zero the gradients, forward, loss, backward, update; gives the loss and the gradients.

    The learning rate is 0: all of the optimiser's traffic, and the same weights in each round.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.99)

    def step(given: Inputs) -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        with _precision(given["images"].device, dtype):
            loss = loss_of(model(given["images"]), given["target"], given["pixel_weight"])
        loss.backward()
        optimizer.step()
        return (loss.detach(), *(parameter.grad for parameter in parameters))

    return [partial(step, given) for given in sets]


def _precision(device: torch.device, dtype: torch.dtype) -> Any:
    return autocast(device, _below_float32(dtype))


def _below_float32(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype.itemsize < 4 else None


def _why_not_frozen(setting: Setting) -> str | None:
    if setting.device.type != "cpu":
        return "compared on the CPU only"
    return "compiling takes longer than --quick allows" if setting.quick else None
