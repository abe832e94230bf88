"""Where the windows of a tiled prediction lie, one axis at a time.

An output pixel depends on the pixels around it and on the phase of the pooling grid: a window that
starts at another remainder modulo 2^(levels - 1) pools other pixels together. So windows start at
multiples of that, and each gives only the pixels that have all their context within it. Then the
tiled result is that of the whole image.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .unet import UNet

# the paper's network takes about 1.1 GB for activations at this height and width
LARGEST_TILE_PX = 1024


class Span(NamedTuple):
    """One window: it starts at pixel ``start`` and gives the image's pixels [first, last)."""

    start: int
    first: int
    last: int
    # where ``first`` lies in the network's output
    offset: int


@dataclass(frozen=True)
class Axis:
    """Windows of ``length`` input pixels that give each pixel of an axis once.

    A window may begin before the image and end behind it: there the image is mirrored.
    """

    length: int
    spans: tuple[Span, ...]


def plan_axis(model: UNet, size: int, tile: int | None = None) -> Axis:
    """Lay windows over ``size`` pixels of an image.

    Windows of a 'valid' network reach into the mirror image on both sides. Those of a 'same'
    network stay within the image, mirrored at its end up to the pooling grid, so that its borders
    are padded with zeros as in training. Where up-sampling is "aligned", each output pixel depends
    on the size of the whole: the only window is the image.

    Args:
        model: the network.
        size: height or width of the image, in pixels.
        tile: height or width of a window, in pixels; of a 'same' network rounded down to the
            pooling grid and to the image. None for the one, up to ``LARGEST_TILE_PX`` if that
            can be, that needs the fewest pixels in all.
    Returns: the windows.
    Raises: ValueError, with the nearest sizes that fit, if ``tile`` does not.
    """
    if model.up == "aligned":
        whole = model.fitting_size(size)
        if tile is not None and tile < whole:
            raise ValueError(
                f"predict: tile must cover the image, {whole} pixels, for a network whose "
                f"up-sampling aligns the corners, got {tile}"
            )
        return Axis(whole, (Span(0, 0, size, 0),))
    if tile is not None:
        axis = _lay(model, size, tile)
        if axis is None:
            raise ValueError(_misfit(model, tile))
        return axis
    smallest, whole = _smallest_tile(model), _whole_tile(model, size)
    tiles = [*range(smallest, max(LARGEST_TILE_PX, smallest) + 1, model.grid)]
    if whole <= tiles[-1]:
        tiles.append(whole)
    axes = [axis for tile in tiles if (axis := _lay(model, size, tile))]
    return min(axes, key=lambda axis: (len(axis.spans) * axis.length, axis.length))


def _lay(model: UNet, size: int, tile: int) -> Axis | None:
    """The windows of ``tile`` pixels over ``size``; None if they do not fit."""
    grid, context = model.grid, model.margin + model.border
    if model.padding == "valid":
        length, before, lost = tile, context, model.margin
        given = length - 2 * context
        if tile != model.fitting_size(tile) or given < 1:
            return None
        furthest = max(0, _round_up(size - given, grid))
    else:
        whole = _whole_tile(model, size)
        length, before, lost = min(tile - tile % grid, whole), 0, 0
        given = length - 2 * context
        furthest = whole - length
    step = _step(given, grid)
    if furthest > 0 and step < 1:
        return None

    spans: list[Span] = []
    first = 0
    for shift in (*range(0, furthest, max(step, 1)), furthest):
        start = shift - before
        last = size if shift == furthest else start + length - context
        spans.append(Span(start, first, last, first - start - lost))
        first = last
    return Axis(length, tuple(spans))


def _whole_tile(model: UNet, size: int) -> int:
    """The smallest window that covers an image of ``size`` pixels alone."""
    if model.padding == "valid":
        return model.fitting_size(size + 2 * (model.margin + model.border))
    return _round_up(size, model.grid)


def _smallest_tile(model: UNet) -> int:
    """The smallest window that can be one of several: it gives a step of the pooling grid."""
    needed = 2 * (model.margin + model.border) + model.grid
    return model.fitting_size(needed) if model.padding == "valid" else _round_up(needed, model.grid)


def _misfit(model: UNet, tile: int) -> str:
    smallest = _smallest_tile(model)
    near = [smallest]
    if tile > smallest:
        above = model.fitting_size(tile)
        near = [above - model.grid, above]
    return (
        f"predict: tile must fit the network, got {tile} pixels; the nearest that fit images of "
        f"any size: {' and '.join(map(str, near))}"
    )


def _round_up(size: int, grid: int) -> int:
    return -(-size // grid) * grid


def _step(given: int, grid: int) -> int:
    """From one window's start to the next, where each gives ``given`` pixels."""
    return given // grid * grid
