"""What a training step is given: tiles of random sections, and the weight of each pixel."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .augment import mirror
from .data import Section, class_frequencies
from .ops import weight_map


def sample_tiles(
    sections: Sequence[Section],
    size: int,
    batch: int,
    margin: int,
    generator: torch.Generator,
    *,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Cut tiles whose outputs lie anywhere in random sections.

    Args:
        sections: where to cut from.
        size: height and width of a tile, in pixels.
        batch: tiles.
        margin: context on each side that the network's output loses, in pixels.
        generator: a CPU generator.
        part: which tiles of the batch to cut; all are drawn.
    Returns: images [B, C, size, size] float32 and labels [B, 2, size, size] int32, class ids and
        cell ids; what lies outside the section is its mirror image.
    """
    places = [_place(sections, size - 2 * margin, generator) for _ in range(batch)]
    images, labels = [], []
    for section, starts in places[part]:
        window = [
            mirror(torch.arange(start - margin, start - margin + size), length).numpy()
            for start, length in zip(starts, section.classes.shape, strict=True)
        ]
        rows, columns = np.ix_(*window)
        images.append(section.image[:, rows, columns])
        labels.append(np.stack([section.classes[rows, columns], section.cells[rows, columns]]))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels).astype(np.int32))


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


def _place(
    sections: Sequence[Section], size: int, generator: torch.Generator
) -> tuple[Section, list[int]]:
    """A random section, and the first row and column of an output of ``size`` pixels in it."""
    section = sections[int(torch.randint(len(sections), (), generator=generator))]
    spans = [max(length - size, 0) for length in section.classes.shape]
    return section, [int(torch.randint(span + 1, (), generator=generator)) for span in spans]
