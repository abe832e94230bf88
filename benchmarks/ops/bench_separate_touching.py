"""separate_touching: background between round cells that touch."""

import numpy as np
import torch
from scipy.ndimage import maximum_filter, minimum_filter

from fastunet import ops

from ..cases import OURS, Call, Case, Contender, Inputs, Setting, each
from ..figure import PAPER_SIZE
from .bench_weight_map import cell_labels

WIDTHS_PX = (1, 3)


def cases(setting: Setting) -> list[Case]:
    """The narrowest border and a wider one; labels are int32."""
    return [
        _case(width_px, batch, size, setting)
        for batch, size in setting.shapes(full=[(1, 512), (1, PAPER_SIZE)], quick=[(1, 256)])
        for width_px in WIDTHS_PX
    ]


def _case(width_px: int, batch: int, size: int, setting: Setting) -> Case:
    def inputs() -> Inputs:
        return {"labels": cell_labels(50, batch, size).to(setting.device)}

    def by_filters(given: Inputs) -> Call:
        labels = given["labels"].cpu().numpy()
        no_cell = np.iinfo(labels.dtype).max
        window = (1, 2 * width_px + 1, 2 * width_px + 1)

        def call() -> tuple[torch.Tensor, ...]:
            largest = maximum_filter(labels, window, mode="nearest")
            smallest = minimum_filter(np.where(labels > 0, labels, no_cell), window, mode="nearest")
            alone = (largest == labels) & (smallest == labels)
            return (torch.from_numpy(np.where(alone, labels, 0)),)

        return call

    def ours(given: Inputs) -> Call:
        labels = given["labels"].clone()
        return lambda: (ops.separate_touching(labels, width_px),)

    return Case(
        operator="separate_touching",
        name=f"{batch} x 50 cells, {size}x{size}, width {width_px}",
        dtype=torch.int32,
        inputs=inputs,
        exact=lambda given: by_filters(given)(),
        contenders=(
            Contender(
                "scipy, two filters",
                each(by_filters),
                backend="scipy",
                trusted=True,
                on_host=True,
            ),
            Contender(OURS, each(ours)),
        ),
        # int32 labels read and written
        moved_bytes=batch * size**2 * (4 + 4),
    )
