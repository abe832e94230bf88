"""weight_map: equation 2 with the default w0 and sigma, on round cells that touch."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from fastunet import ops

from ..cases import OURS, Call, Case, Contender, Inputs, Setting

W0, SIGMA_PX = 10.0, 5.0
CELLS, QUICK_CELLS = (20, 50, 200), (20, 50)

Image = NDArray[Any]
Distance = Callable[[Image], Image]
Nearest = Callable[[Image, Distance], tuple[Image, Image]]


def cases(setting: Setting) -> list[Case]:
    """Images with few and with many cells; there is one dtype, float32."""
    size = setting.size or (256 if setting.quick else 512)
    return [_case(cells, size, setting) for cells in (QUICK_CELLS if setting.quick else CELLS)]


def _case(cells: int, size: int, setting: Setting) -> Case:
    batch = setting.batch or 1

    def inputs() -> Inputs:
        images = [round_cells(cells, size, seed) for seed in range(batch)]
        return {"labels": torch.from_numpy(np.stack(images)).to(setting.device)}

    return Case(
        operator="weight_map",
        name=f"{batch} x {cells} cells, {size}x{size}",
        dtype=torch.float32,
        inputs=inputs,
        exact=lambda given: _by_cell(_arrays(given), scipy_distance, two_smallest, np.float64),
        contenders=(
            Contender(
                "scipy, two smallest",
                _by_hand(scipy_distance, two_smallest),
                backend="scipy",
                trusted=True,
                on_host=True,
            ),
            Contender(
                "scipy, sorted",
                _by_hand(scipy_distance, stack_and_sort),
                backend="scipy",
                on_host=True,
            ),
            Contender(
                "edt, two smallest",
                _by_hand(edt_distance, two_smallest),
                backend="edt",
                skip=None if find_spec("edt") else "edt is not installed",
                on_host=True,
            ),
            Contender(OURS, _prepare_ours),
        ),
        # int32 labels read, float32 weights written
        moved_bytes=batch * size**2 * (4 + 4),
    )


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


def two_smallest(labels: Image, distance: Distance) -> tuple[Image, Image]:
    """d1 and d2 by one distance transform a cell, of which the two smallest are kept."""
    d1, d2 = (np.full(labels.shape, np.inf) for _ in range(2))
    for k in np.unique(labels[labels > 0]):
        d = distance(labels != k)
        np.minimum(d2, np.maximum(d1, d), out=d2)
        np.minimum(d1, d, out=d1)
    return d1, d2


def stack_and_sort(labels: Image, distance: Distance) -> tuple[Image, Image]:
    """d1 and d2 by one distance transform a cell, all of them sorted."""
    stack = np.stack([distance(labels != k) for k in np.unique(labels[labels > 0])])
    stack.sort(axis=0)
    return stack[0], stack[1]


def _prepare_ours(given: Inputs) -> Call:
    return lambda: (ops.weight_map(given["labels"], w0=W0, sigma=SIGMA_PX),)


def _by_hand(distance: Distance, nearest: Nearest) -> Callable[[Inputs], Call]:
    def prepare(given: Inputs) -> Call:
        labels = _arrays(given)
        return lambda: _by_cell(labels, distance, nearest, np.float32)

    return prepare


def _by_cell(
    labels: Image, distance: Distance, nearest: Nearest, dtype: type
) -> tuple[torch.Tensor]:
    """Equation 2 for [B, H, W] labels, with balanced class weights."""
    share = (labels > 0).mean()
    weights: Image = np.where(labels > 0, 0.5 / share, 0.5 / (1 - share)).astype(dtype)
    for i, image in enumerate(labels):
        d1, d2 = nearest(image, distance)
        weights[i] += W0 * np.exp(-((d1 + d2).astype(dtype) ** 2) / (2 * SIGMA_PX**2))
    return (torch.from_numpy(weights),)


def _arrays(given: Inputs) -> Image:
    return given["labels"].cpu().numpy()
