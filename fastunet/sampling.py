"""What a training step is given: tiles of random sections, and the weight of each pixel."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augment import mirror
from .data import Section, class_frequencies
from .ops import weight_map

T = TypeVar("T")


def sample_tiles(
    sections: Sequence[Section],
    size: int,
    batch: int,
    margin: int,
    generator: torch.Generator,
    *,
    part: slice = slice(None),
    rare: "RareClasses | None" = None,
) -> tuple[Tensor, Tensor]:
    """Cut tiles whose outputs lie anywhere in random sections.

    Args:
        sections: where to cut from.
        size: height and width of a tile, in pixels.
        batch: tiles.
        margin: context on each side that the network's output loses, in pixels.
        generator: a CPU generator.
        part: which tiles of the batch to cut; all are drawn.
        rare: where some of the tiles lie instead: around pixels of classes.
    Returns: images [B, C, size, size] float32 and labels [B, 2, size, size] int32, class ids and
        cell ids; what lies outside the section is its mirror image.
    """
    output = size - 2 * margin
    places = [
        (rare and rare.place(output, generator)) or _place(sections, output, generator)
        for _ in range(batch)
    ]
    some = places[part]
    images = np.empty((len(some), sections[0].image.shape[0], size, size), np.float32)
    labels = np.empty((len(some), 2, size, size), np.int32)
    for image, label, (section, starts) in zip(images, labels, some, strict=True):
        rows, columns = (
            mirror(torch.arange(start - margin, start - margin + size), length).numpy()
            for start, length in zip(starts, section.classes.shape, strict=True)
        )
        image[:] = _cut(section.image, rows, columns)
        label[0] = _cut(section.classes, rows, columns)
        label[1] = _cut(section.cells, rows, columns)
    return torch.from_numpy(images), torch.from_numpy(labels)


class RareClasses:
    """Draws tiles that show a class, so that rare ones are seen more often.

    With ``probability`` a tile is drawn in three steps: a class, each that occurs with the same
    probability; a pixel of it, each in the training set with the same probability; and a place for
    the tile's output, each that covers the pixel and stays in the section with the same one.

    Args:
        sections: the training set.
        n_classes: K.
        probability: of a tile to be drawn so, and not anywhere; 0 to 1.
    Source: the foreground over-sampling of nnU-Net, Isensee et al. 2021, for each class.
    """

    def __init__(self, sections: Sequence[Section], n_classes: int, probability: float) -> None:
        self.sections, self.probability = sections, probability
        # all rows of all sections, and how many pixels of a class each and those before it have
        self._rows = [(s, i) for s in sections for i in range(s.classes.shape[0])]
        counts = np.concatenate(
            [np.stack([(s.classes == k).sum(1) for k in range(n_classes)], 1) for s in sections]
        )
        self._classes = np.flatnonzero(counts.any(0))
        self._until = counts.cumsum(0, dtype=np.int64)

    def place(self, size: int, generator: torch.Generator) -> tuple[Section, list[int]] | None:
        """A section, and the first row and column of an output of ``size`` pixels in it.

        None where the tile is to be drawn anywhere.
        """
        if torch.rand((), generator=generator) >= self.probability:
            return None

        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        k = self._classes[draw(len(self._classes))]
        until = self._until[:, k]
        number = draw(int(until[-1]))
        at = int(np.searchsorted(until, number, side="right"))
        section, row = self._rows[at]
        in_row = np.flatnonzero(section.classes[row] == k)
        column = int(in_row[number - until[at]])
        starts = []
        for pixel, length in zip((row, column), section.classes.shape, strict=True):
            first, last = max(0, pixel - size + 1), min(pixel, max(length - size, 0))
            starts.append(first + draw(last - first + 1))
        return section, starts


def fold(sections: Sequence[T], folds: int, index: int) -> tuple[list[T], list[T]]:
    """Sections to train on and to validate on, for cross-validation.

    The sections are split into ``folds`` runs of neighbours, as even as can be, since neighbours in
    a stack resemble each other; one of them is held out.

    Args:
        sections: at least ``folds``.
        folds: 2 or more.
        index: the fold that is held out, from 0.
    Returns: the others, and the fold.
    Raises: ValueError for numbers that cannot be.
    """
    if not 2 <= folds <= len(sections):
        raise ValueError(
            f"train: folds must be from 2 to the {len(sections)} sections, got {folds}"
        )
    if not 0 <= index < folds:
        raise ValueError(f"train: fold must be from 0 to {folds - 1}, got {index}")
    ends = np.linspace(0, len(sections), folds + 1).round().astype(int)
    first, last = ends[index], ends[index + 1]
    return [*sections[:first], *sections[last:]], list(sections[first:last])


def pixel_weights(
    classes: Tensor, cells: Tensor, class_weight: Tensor, w0: float, sigma: float
) -> Tensor:
    """The paper's weights: that of a pixel's class, plus the border term between cells.

        w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

    Args:
        classes: [B, H, W] class ids.
        cells: [B, H, W] cell ids, 0 is background.
        class_weight: [K] float32.
        w0: height of the border term; 0 for none.
        sigma: width of the border term, in pixels.
    Returns: [B, H, W] float32.
    Source: Ronneberger et al. 2015, equation 2.
    """
    weights = class_weight[classes.long()]
    if w0 > 0:
        # the map with w_c = 1, less that 1
        weights = weights + weight_map(cells, w0=w0, sigma=sigma, class_weight=None) - 1
    return weights


def class_weights(sections: Sequence[Section], n_classes: int, how: str) -> Tensor:
    """The class part of the weights.

    Args:
        sections: the training set.
        n_classes: K.
        how: "none" for ones, "balanced" for weights such that each class weighs the same in sum.
    Returns: [K] float32; 1 for a class that never occurs.
    """
    if how == "none":
        return torch.ones(n_classes)
    frequencies = torch.from_numpy(class_frequencies(sections, n_classes))
    return torch.where(frequencies > 0, 1 / (n_classes * frequencies), 1.0).float()


def _cut(plane: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
    """Some rows and columns, all in range, of the last two axes."""
    # one axis after the other is 2.5 times as fast as both at once
    return plane.take(rows, -2, mode="clip").take(columns, -1, mode="clip")


def _place(
    sections: Sequence[Section], size: int, generator: torch.Generator
) -> tuple[Section, list[int]]:
    """A random section, and the first row and column of an output of ``size`` pixels in it."""
    section = sections[int(torch.randint(len(sections), (), generator=generator))]
    spans = [max(length - size, 0) for length in section.classes.shape]
    return section, [int(torch.randint(span + 1, (), generator=generator)) for span in spans]
