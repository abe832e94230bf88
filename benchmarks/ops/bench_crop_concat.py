"""crop_concat: the grey "copy and crop" arrows of figure 1."""

import torch

from fastunet import ops

from ..cases import Case, Inputs, Setting, exactly, noise, rivals
from ..figure import Arrow, arrows

LEAVES = ("skip", "up")
# from the deepest, where launching counts, to the widest, where memory does
QUICK_ARROWS = (0, 3)


def cases(setting: Setting) -> list[Case]:
    """The four arrows, forward alone and with both gradients."""
    return [
        _case(arrow, batch, dtype, backward, setting)
        for batch, size in setting.layer_shapes(quick_size=380)
        for dtype in setting.dtypes
        for backward in (False, True)
        for i, arrow in enumerate(a for a in arrows(size) if a.kind == "copy")
        if i in QUICK_ARROWS or not setting.quick
    ]


def _case(arrow: Arrow, batch: int, dtype: torch.dtype, backward: bool, setting: Setting) -> Case:
    c, size, skip_size = arrow.c_in, arrow.size, arrow.skip_size

    def inputs() -> Inputs:
        return {
            "skip": noise((batch, c, skip_size, skip_size), setting.device, dtype, seed=0),
            "up": noise((batch, c, size, size), setting.device, dtype, seed=1),
        }

    leaves = LEAVES if backward else ()
    # both halves read and written; backward, the skip's half is read and all of it written, while
    # the other half is a view
    pixels = 4 * size**2 + backward * (size**2 + skip_size**2)
    name = f"{batch} x {c}+{c}, {skip_size}x{skip_size} to {size}x{size}"
    return Case(
        operator="crop_concat",
        name=name + (", forward + backward" if backward else ", forward"),
        dtype=dtype,
        inputs=inputs,
        exact=exactly(ops.eager.crop_concat, leaves),
        contenders=rivals(ops.eager.crop_concat, ops.crop_concat, leaves, setting),
        moved_bytes=batch * c * pixels * dtype.itemsize,
    )
