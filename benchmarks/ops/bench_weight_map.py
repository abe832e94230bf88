"""weight_map: equation 2 with the default w0 and sigma, on round cells that touch."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch.utils.dlpack import from_dlpack

from fastunet import ops

from ..cases import OURS, Call, Case, Contender, Inputs, Prepare, Setting, each, why_no_gpu
from ..figure import PAPER_SIZE

W0, SIGMA_PX = 10.0, 5.0
CELLS, QUICK_CELLS = (20, 50, 200), (20, 50)

# of NumPy, or of CuPy, which has the same functions for a GPU
Image = Any
Distance = Callable[[Image], Image]
Nearest = Callable[[ModuleType, Image, Distance], tuple[Image, Image]]


def cases(setting: Setting) -> list[Case]:
    """Images with few and with many cells; there is one dtype, float32."""
    return [
        _case(cells, batch, size, setting)
        for batch, size in setting.shapes(full=[(1, 512), (1, PAPER_SIZE)], quick=[(1, 256)])
        for cells in (QUICK_CELLS if setting.quick else CELLS)
    ]


def _case(cells: int, batch: int, size: int, setting: Setting) -> Case:
    def inputs() -> Inputs:
        return {"labels": cell_labels(cells, batch, size).to(setting.device)}

    def exact(given: Inputs) -> tuple[torch.Tensor, ...]:
        labels = given["labels"].cpu().numpy()
        return (torch.from_numpy(by_cell(np, labels, scipy_distance, two_smallest, "float64")),)

    return Case(
        operator="weight_map",
        name=f"{batch} x {cells} cells, {size}x{size}",
        dtype=torch.float32,
        inputs=inputs,
        exact=exact,
        contenders=(
            Contender(
                "scipy, two smallest",
                _on_host(scipy_distance, two_smallest),
                backend="scipy",
                trusted=True,
                on_host=True,
            ),
            Contender(
                "scipy, sorted",
                _on_host(scipy_distance, stack_and_sort),
                backend="scipy",
                on_host=True,
            ),
            Contender(
                "edt, two smallest",
                _on_host(edt_distance, two_smallest),
                backend="edt",
                skip=_why_not("edt"),
                on_host=True,
            ),
            Contender(
                "cuCIM, two smallest",
                each(prepare_cucim),
                backend="cuCIM",
                skip=why_no_gpu(setting) or _why_not("cupy") or _why_not("cucim"),
            ),
            Contender(OURS, each(_prepare_ours)),
        ),
        # int32 labels read, float32 weights written
        moved_bytes=batch * size**2 * (4 + 4),
    )


def cell_labels(cells: int, batch: int, size: int) -> torch.Tensor:
    """[batch, size, size] int32: other cells in each image."""
    return torch.from_numpy(np.stack([round_cells(cells, size, seed) for seed in range(batch)]))


def round_cells(cells: int, size: int, seed: int) -> NDArray[np.int32]:
    """[size, size] labels: disks that fill two thirds of the image and meet halfway."""
    centres = np.random.default_rng(seed).uniform(0, size, (cells, 2))
    radius = size * (2 / 3 / np.pi / cells) ** 0.5
    rows, columns = np.ogrid[:size, :size]
    nearest = np.full((size, size), radius**2)
    labels = np.zeros((size, size), np.int32)
    for k, (row, column) in enumerate(centres, 1):
        square = (rows - row) ** 2 + (columns - column) ** 2
        labels[square < nearest] = k
        np.minimum(nearest, square, out=nearest)
    return labels


def scipy_distance(is_other: Image) -> Image:
    """Distance of each pixel to the nearest where ``is_other`` is False, by scipy."""
    return distance_transform_edt(is_other)


def edt_distance(is_other: Image) -> Image:
    """The same by the edt package, on as many threads as PyTorch has."""
    import edt

    return edt.edt(is_other, parallel=torch.get_num_threads())


def two_smallest(xp: ModuleType, labels: Image, distance: Distance) -> tuple[Image, Image]:
    """d1 and d2 by one distance transform a cell, of which the two smallest are kept."""
    d1, d2 = (xp.full(labels.shape, xp.inf) for _ in range(2))
    for k in xp.unique(labels[labels > 0]):
        d = distance(labels != k)
        xp.minimum(d2, xp.maximum(d1, d), out=d2)
        xp.minimum(d1, d, out=d1)
    return d1, d2


def stack_and_sort(xp: ModuleType, labels: Image, distance: Distance) -> tuple[Image, Image]:
    """d1 and d2 by one distance transform a cell, all of them sorted."""
    stack = xp.stack([distance(labels != k) for k in xp.unique(labels[labels > 0])])
    stack.sort(axis=0)
    return stack[0], stack[1]


def by_cell(
    xp: ModuleType, labels: Image, distance: Distance, nearest: Nearest, dtype: str
) -> Image:
    """Equation 2 for [B, H, W] labels, with balanced class weights."""
    share = (labels > 0).mean()
    weights = xp.where(labels > 0, 0.5 / share, 0.5 / (1 - share)).astype(dtype)
    for i, image in enumerate(labels):
        d1, d2 = nearest(xp, image, distance)
        weights[i] += W0 * xp.exp(-((d1 + d2).astype(dtype) ** 2) / (2 * SIGMA_PX**2))
    return weights


def prepare_cucim(given: Inputs) -> Call:
    """The distance transforms of cuCIM, on the GPU from end to end."""
    cupy = import_module("cupy")
    distance = import_module("cucim.core.operations.morphology").distance_transform_edt
    labels = cupy.from_dlpack(given["labels"].clone())
    return lambda: (from_dlpack(by_cell(cupy, labels, distance, two_smallest, "float32")),)


def _prepare_ours(given: Inputs) -> Call:
    labels = given["labels"].clone()
    return lambda: (ops.weight_map(labels, w0=W0, sigma=SIGMA_PX),)


def _on_host(distance: Distance, nearest: Nearest) -> Prepare:
    def prepare(given: Inputs) -> Call:
        labels = given["labels"].cpu().numpy()
        return lambda: (torch.from_numpy(by_cell(np, labels, distance, nearest, "float32")),)

    return each(prepare)


def _why_not(package: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"
