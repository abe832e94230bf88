"""The border weights of the U-Net paper, and the carving of touching cells, in plain PyTorch.

The map needs, at every pixel, the distances d1 and d2 to the nearest and to the second nearest
*distinct* cell. For a set S of pixels keep the triple

    T_S(x) = (id of the nearest cell, its squared distance, squared distance of the nearest other)

Two triples merge into the triple of the union: the smaller first distance wins; the second is the
smallest of both seconds and, if the ids differ, of the loser's first. So the transform is separable
and exact: one scan along a line gives T of the line, then every further axis merges the triples of
its lines, each moved by the squared offset between them. docs/maths/weight_map.md has the proof.

Labels are [B, D, H, W], int32 or int64; an image is a volume of depth 1. Ids <= 0 are no cell.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# nearest id, squared distances to it and to the nearest other cell, all of the labels' shape
Triple = tuple[Tensor, Tensor, Tensor]

# images of a batch that are worked on together hold at most this many pixels, or are one image
CHUNK_PIXELS = 1 << 20
# beyond it the exponential is zero in float32
LARGEST_EXPONENT = 104.0


def weight_map_reference(
    labels: Tensor,
    class_weight: Tensor | None,
    balanced: bool,
    w0: float,
    sigma: float,
    spacing_d: float,
    spacing_h: float,
    spacing_w: float,
    distances: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)), with d1 and d2 where asked for."""
    shape = labels.shape if distances else (0,)
    weights = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    d1, d2 = (weights.new_empty(shape) for _ in range(2))
    if labels.numel() == 0:
        return weights, d1, d2
    labels = labels.clamp(min=0)
    if balanced:
        class_weight = balanced_class_weight(labels)
        smallest = 0.5
    elif class_weight is None:
        class_weight = weights.new_ones(2)
        smallest = 1.0
    else:
        # its values may be on a GPU: not worth waiting for
        smallest = 0.0
    reach = math.inf if distances else border_reach(w0, sigma, smallest)
    spacing = (spacing_d, spacing_h, spacing_w)
    images = max(1, CHUNK_PIXELS // labels[0].numel())
    for start in range(0, labels.shape[0], images):
        chunk = slice(start, start + images)
        first, second = (square.sqrt_() for square in two_nearest(labels[chunk], spacing, reach))
        border = (first + second).square_().mul_(-0.5 / sigma**2).exp_().mul_(w0)
        torch.where(labels[chunk] > 0, class_weight[1], class_weight[0], out=weights[chunk])
        weights[chunk] += border
        if distances:
            d1[chunk], d2[chunk] = first, second
    return weights, d1, d2


def balanced_class_weight(labels: Tensor) -> Tensor:
    """[2] weights of background and cells that give both the same total and every pixel mean 1."""
    cells = (labels > 0).sum()
    counts = torch.stack((labels.numel() - cells, cells))
    weight = labels.numel() / (2.0 * counts)
    return weight.masked_fill((counts == 0).any(), 1.0)


def border_reach(w0: float, sigma: float, smallest_class_weight: float) -> float:
    """The d1 + d2 from which the border term no longer changes a float32 weight."""
    if w0 == 0.0:
        return 0.0
    invisible = smallest_class_weight * 2.0**-26
    exponent = math.log(w0 / invisible) if invisible > 0 else LARGEST_EXPONENT
    return sigma * math.sqrt(2.0 * min(max(exponent, 0.0), LARGEST_EXPONENT))


def two_nearest(labels: Tensor, spacing: Sequence[float], reach: float) -> tuple[Tensor, Tensor]:
    """Squared distances to the nearest and the second nearest cell, exact if both are < reach."""
    axes = [axis for axis in (1, 2, 3) if labels.shape[axis] > 1] or [3]
    nearest = scan_lines(labels, axes[0], spacing[axes[0] - 1])
    for axis in axes[1:]:
        nearest = merge_lines(nearest, axis, spacing[axis - 1], reach)
    return nearest[1], nearest[2]


def scan_lines(labels: Tensor, axis: int, spacing: float) -> Triple:
    """Triples of the lines along ``axis``: a scan from either end, then merged."""
    nearest = _nearest_behind(labels, axis, spacing)
    ahead = tuple(t.flip(axis) for t in _nearest_behind(labels.flip(axis), axis, spacing))
    _absorb(nearest, (ahead[0], ahead[1], ahead[2]), 0.0)
    return nearest


def merge_lines(nearest: Triple, axis: int, spacing: float, reach: float) -> Triple:
    """Merge, at every pixel, the triples along ``axis``, each moved by its squared offset."""
    size = nearest[0].shape[axis]
    merged = (nearest[0].clone(), nearest[1].clone(), nearest[2].clone())
    squares = (torch.arange(size, dtype=torch.float32) * spacing).square().tolist()
    for step, square in enumerate(squares[1:], 1):
        if square >= reach**2:
            break
        # without a reach only the data says when to stop, and asking it waits for the device
        if reach == math.inf and step % 16 == 0 and not (merged[2] > square).any():
            break
        for target, source in ((step, 0), (0, step)):
            into = tuple(t.narrow(axis, target, size - step) for t in merged)
            candidate = tuple(t.narrow(axis, source, size - step) for t in nearest)
            _absorb((into[0], into[1], into[2]), (candidate[0], candidate[1], candidate[2]), square)
    return merged


def _absorb(into: Triple, candidate: Triple, square: float) -> None:
    """Merge ``candidate``, moved by ``square``, into ``into``."""
    ident, first, second = into
    new_ident, new_first = candidate[0], candidate[1] + square
    loser = torch.maximum(first, new_first).masked_fill_(ident == new_ident, math.inf)
    torch.minimum(second, torch.minimum(loser, candidate[2] + square), out=second)
    torch.where(new_first < first, new_ident, ident, out=ident)
    torch.minimum(first, new_first, out=first)


def _nearest_behind(labels: Tensor, axis: int, spacing: float) -> Triple:
    """Triples of the part of each line at or behind each pixel."""
    size = labels.shape[axis]
    shape = [size if a == axis else 1 for a in range(labels.ndim)]
    position = torch.arange(size, dtype=torch.int32, device=labels.device).view(shape)
    is_cell = labels > 0
    last = torch.where(is_cell, position, -1).cummax(axis).values
    ident = labels.gather(axis, last.clamp(min=0).long())
    # the other cell nearest behind is the one that the current run of equal ids followed
    changes = is_cell & (torch.roll(ident, 1, axis) != labels) & (position > 0)
    other = torch.where(changes, torch.roll(last, 1, axis), -1).cummax(axis).values
    first, second = (
        ((position - row).float() * spacing).square_().masked_fill_(row < 0, math.inf)
        for row in (last, other)
    )
    return ident, first, second


def separate_touching_reference(labels: Tensor, width: int) -> Tensor:
    """Zero where another cell is within ``width`` of a cell's pixel along every axis."""
    if labels.numel() == 0:
        return labels.clone()
    nothing = torch.iinfo(labels.dtype).max
    largest = labels
    smallest = torch.where(labels > 0, labels, nothing)
    for axis in (1, 2, 3):
        largest = _window_maximum(largest, axis, width)
        # ~ turns the order of integers round
        smallest = ~_window_maximum(~smallest, axis, width)
    touching = (labels > 0) & ((largest != labels) | (smallest != labels))
    return labels.masked_fill(touching, 0)


def _window_maximum(values: Tensor, axis: int, width: int) -> Tensor:
    """Maximum over the 2 width + 1 entries around each along ``axis``, in log3(width) steps."""
    last = values.shape[axis] - 1
    position = torch.arange(last + 1, device=values.device)
    width = min(width, last)
    covered = 0
    while covered < width:
        step = min(2 * covered + 1, width - covered)
        behind, ahead = (
            values.index_select(axis, (position + shift).clamp(0, last)) for shift in (-step, step)
        )
        values = torch.maximum(values, torch.maximum(behind, ahead))
        covered += step
    return values
