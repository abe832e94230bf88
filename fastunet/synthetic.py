"""Synthetic microscope images of touching cells, so that nothing must be downloaded."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

from .files import replacing


def cells(
    *, size: tuple[int, int] = (256, 256), count: int = 24, seed: int | Sequence[int] = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw cells as a fluorescence microscope shows them, and their labels.

    Cells differ in size, shape and brightness and take about half of the image. Most touch another
    one; only a faint darker line tells the two apart. Light is uneven, the picture soft and noisy.

    Args:
        size: height and width in pixels.
        count: number of cells, which sets their size; one that finds no room is left out.
        seed: of the random numbers; equal arguments give equal pixels.
    Returns: image [H, W] uint8; labels [H, W] uint16, 0 is background and k > 0 the k-th cell.
    Raises: ValueError if a size is below 1 or ``count`` not from 1 to 65535.
    """
    height, width = size
    if min(size) < 1:
        raise ValueError(f"cells: size must be at least 1 x 1, got {height} x {width}")
    if not 1 <= count <= 65535:
        raise ValueError(f"cells: count must be from 1 to 65535, got {count}")
    rng = np.random.default_rng(seed)
    radius = math.sqrt(0.55 * height * width / (count * math.pi))
    radii = radius * rng.lognormal(-0.05, 0.3, count)
    places = _places(rng, radii, size)
    placed = ~np.isnan(places[:, 0])
    labels, depth, gap = _regions(rng, radii[placed], places[placed], size)
    # a cell is a dome, darker where it meets another
    brightness = np.append(0, rng.uniform(0.4, 1, count))[labels]
    seam = np.append(0, rng.uniform(0.25, 0.5, count))[labels]
    dome = 1 - 0.5 * np.exp(-depth / (0.25 * radius))
    line = 1 - seam * np.exp(-((gap / 2) ** 2))
    texture = 1 + 0.25 * _clouds(rng, size, radius / 5)
    body = gaussian_filter(brightness * dome * line * texture, 1)
    haze = 0.18 + 0.07 * _clouds(rng, size, radius)
    light = 0.75 + 0.4 * _clouds(rng, size, max(size) / 2)
    grey = light * (haze + 0.7 * body)
    # light comes in photons, and the camera adds its own
    grey += rng.normal(size=size) * np.sqrt(0.0004 + 0.004 * np.maximum(grey, 0))
    return (255 * np.clip(grey, 0, 1)).round().astype(np.uint8), labels


def _places(rng: np.random.Generator, radii: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centres [N, 2] of cells that touch without covering each other; NaN where is no room."""
    places = np.full((len(radii), 2), np.nan)
    for k, radius in enumerate(radii):
        tries = rng.uniform((0, 0), size, (40, 2))
        if k:
            # two in three go beside one that is there
            beside = rng.integers(k, size=26)
            angle = rng.uniform(0, 2 * np.pi, 26)
            reach = 0.86 * (radii[beside] + radius)
            way = np.stack([np.sin(angle), np.cos(angle)], axis=1)
            tries[:26] = places[beside] + reach[:, None] * way
        distance = np.linalg.norm(tries[:, None] - places[:k], axis=2)
        free = ~(distance < 0.85 * (radii[:k] + radius)).any(axis=1)
        free &= ((tries >= 0) & (tries < size)).all(axis=1)
        if free.any():
            places[k] = tries[free.argmax()]
    return places


def _regions(
    rng: np.random.Generator, radii: np.ndarray, places: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, depth within the own cell and lead over the next one, both in pixels, all [H, W]."""
    labels = np.zeros(size, np.uint16)
    # signed distance to the nearest outline and the second nearest, negative inside
    nearest, second = np.full(size, 1e9), np.full(size, 1e9)
    for number, (place, radius) in enumerate(zip(places, radii, strict=True), start=1):
        low = np.maximum(place - 1.6 * radius, 0).astype(int)
        high = np.minimum(place + 1.6 * radius + 1, size).astype(int)
        window = (slice(low[0], high[0]), slice(low[1], high[1]))
        y, x = np.ogrid[window]
        dy, dx = y - place[0], x - place[1]
        angle = np.arctan2(dy, dx)
        outline = np.ones_like(angle)
        for waves, height in ((2, 0.2), (3, 0.08), (5, 0.04)):
            swing, turn = rng.uniform((-height, 0), (height, 2 * np.pi))
            outline += swing * np.cos(waves * angle + turn)
        distance = np.hypot(dy, dx) - radius * outline
        ahead = distance < nearest[window]
        second[window] = np.where(ahead, nearest[window], np.minimum(second[window], distance))
        nearest[window] = np.where(ahead, distance, nearest[window])
        labels[window][ahead & (distance < 0)] = number
    return labels, np.maximum(-nearest, 0), second - nearest


def _clouds(rng: np.random.Generator, size: tuple[int, int], scale: float) -> np.ndarray:
    """Smooth noise [H, W] around 0, mostly within -1..1, of patches about ``scale`` pixels wide."""
    grid = rng.uniform(-1, 1, [int(n / max(scale, 1)) + 2 for n in size])
    # linear between the points of the grid, down its columns and then along its rows
    for n in size:
        below, share = np.divmod(np.arange(n) / max(scale, 1), 1)
        row = below.astype(int)
        grid = grid[row].T * (1 - share) + grid[row + 1].T * share
    return grid


def write_cells(
    folder: str | Path,
    *,
    pages: int = 8,
    size: tuple[int, int] = (256, 256),
    count: int = 24,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write a stack of synthetic images and one of their labels, as ``cells`` draws them.

    Args:
        folder: where to; made if it is not there. Files of the same name are replaced.
        pages: number of images, each different.
        size: height and width in pixels.
        count: number of cells in each.
        seed: of the random numbers; equal arguments give equal files.
    Returns: the paths of ``images.tif`` and ``labels.tif``.
    Raises: ValueError if ``pages`` is below 1, or as ``cells`` does.
    """
    if pages < 1:
        raise ValueError(f"write_cells: pages must be at least 1, got {pages}")
    drawn = [cells(size=size, count=count, seed=(seed, page)) for page in range(pages)]
    paths = Path(folder) / "images.tif", Path(folder) / "labels.tif"
    for path, stack in zip(paths, zip(*drawn, strict=True), strict=True):
        with replacing(path) as temporary:
            tifffile.imwrite(
                temporary, np.stack(stack), photometric="minisblack", compression="zlib"
            )
    return paths
