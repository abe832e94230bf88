"""Scores of pixels and their classes."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .labels import IntArray, label_pair, ratio


def pixel_error(predicted: ArrayLike, true: ArrayLike) -> float:
    """The share of pixels whose class is wrong.

    Args:
        predicted: integer or bool classes, any shape.
        true: classes of the same shape.
    Returns: from 0 to 1; 0 for a page without pixels.
    Raises: ValueError if shapes differ or a class is negative; TypeError if not integers.
    Source: Arganda-Carreras et al. 2015.
    """
    a, b = label_pair("pixel_error", predicted, true)
    return float(np.mean(a != b)) if a.size else 0.0


def iou(
    predicted: ArrayLike, true: ArrayLike, *, n_classes: int | None = None
) -> NDArray[np.float64]:
    """Intersection over union of each class; the mean IoU is its ``mean()``.

    Args:
        predicted: integer or bool classes, any shape.
        true: classes of the same shape.
        n_classes: K; by default the highest class of either image plus one, at least 2.
    Returns: [K] float64; 1 for a class that neither image contains.
    Raises: ValueError if shapes differ or a class is negative or >= K; TypeError if not integers.
    """
    both, predicted_px, true_px = _class_areas("iou", predicted, true, n_classes)
    return ratio(both, predicted_px + true_px - both)


def dice(
    predicted: ArrayLike, true: ArrayLike, *, n_classes: int | None = None
) -> NDArray[np.float64]:
    """The Dice coefficient 2 |A and B| / (|A| + |B|) of each class.

    Args:
        predicted: integer or bool classes, any shape.
        true: classes of the same shape.
        n_classes: K; by default the highest class of either image plus one, at least 2.
    Returns: [K] float64; 1 for a class that neither image contains.
    Raises: ValueError if shapes differ or a class is negative or >= K; TypeError if not integers.
    """
    both, predicted_px, true_px = _class_areas("dice", predicted, true, n_classes)
    return ratio(2 * both, predicted_px + true_px)


def _class_areas(
    function: str, predicted: ArrayLike, true: ArrayLike, n_classes: int | None
) -> tuple[IntArray, IntArray, IntArray]:
    """Pixels of each class in both, in the prediction and in the truth, [K] each."""
    a, b = label_pair(function, predicted, true)
    found = 1 + max((int(x.max()) for x in (a, b) if x.size), default=0)
    if n_classes is not None and found > n_classes:
        raise ValueError(f"{function}: classes must be < {n_classes}, got {found - 1}")
    count = n_classes or max(2, found)
    a, b = a.ravel(), b.ravel()
    both, predicted_px, true_px = (np.bincount(x, minlength=count) for x in (a[a == b], a, b))
    return both, predicted_px, true_px
