"""weighted_cross_entropy: the loss on the paper network's output, with border weights."""

import torch

from fastunet import ops

from ..cases import Case, Inputs, Setting, exactly, noise, rivals
from ..figure import PAPER_SIZE, arrows

CLASSES = (2, 8, 16)


def cases(setting: Setting) -> list[Case]:
    """Figure 1's two classes and more, forward alone and with the gradient of the logits."""
    shapes = setting.layer_shapes(quick_size=PAPER_SIZE)
    return [
        _case(classes, (batch, head.size, head.size), dtype, backward, setting)
        for batch, (*_, head) in ((batch, arrows(size)) for batch, size in shapes)
        for dtype in setting.dtypes
        for backward in (False, True)
        for classes in (CLASSES[:2] if setting.quick else CLASSES)
    ]


def _case(
    classes: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    backward: bool,
    setting: Setting,
) -> Case:
    batch, size, _ = shape

    def inputs() -> Inputs:
        target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(0))
        return {
            "logits": noise((batch, classes, size, size), setting.device, dtype, seed=1),
            "target": target.to(setting.device),
            "pixel_weight": 1 + noise(shape, setting.device, torch.float32, seed=2).square(),
        }

    leaves = ("logits",) if backward else ()
    # logits, int64 target and float32 weight read once; the gradient of the logits written
    pixel_bytes = classes * dtype.itemsize * (1 + backward) + 8 + 4
    return Case(
        operator="weighted_cross_entropy",
        name=f"{batch} x {classes} classes, {size}x{size}"
        + (", forward + backward" if backward else ", forward"),
        dtype=dtype,
        inputs=inputs,
        exact=exactly(ops.eager.weighted_cross_entropy, leaves),
        contenders=rivals(
            ops.eager.weighted_cross_entropy, ops.weighted_cross_entropy, leaves, setting
        ),
        moved_bytes=batch * size**2 * pixel_bytes,
    )
