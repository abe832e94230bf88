"""What scores compare: labels, checked, how they overlap, and quotients of counts."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float32]


def as_labels(function: str, name: str, labels: ArrayLike) -> IntArray:
    """``labels`` as non-negative integers."""
    array = np.asarray(labels)
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{function}: {name} must be integers or bool, got {array.dtype}")
    if array.size and array.min() < 0:
        raise ValueError(f"{function}: {name} must not be negative, got {array.min()}")
    return array


def label_pair(function: str, predicted: ArrayLike, true: ArrayLike) -> tuple[IntArray, IntArray]:
    a, b = as_labels(function, "predicted", predicted), as_labels(function, "true", true)
    if a.shape != b.shape:
        raise ValueError(
            f"{function}: predicted and true must have one shape, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    return a, b


def instance_pair(
    function: str, predicted: ArrayLike, true: ArrayLike
) -> tuple[IntArray, IntArray]:
    a, b = label_pair(function, predicted, true)
    return compact(a), compact(b)


def compact(ids: IntArray) -> IntArray:
    """Rename ids so that tables indexed by them stay smaller than the page; 0 stays 0."""
    if not ids.size or ids.max() <= ids.size:
        return ids.astype(np.int64)
    # the appended 0 makes 0 the first of the sorted ids
    with_zero = np.append(ids, np.zeros(1, ids.dtype))
    return np.unique(with_zero, return_inverse=True)[1][:-1].reshape(ids.shape)


def ratio(part: IntArray, whole: IntArray) -> NDArray[np.float64]:
    """``part / whole``, and 1 where both are 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def as_probability(function: str, probability: ArrayLike) -> FloatArray:
    """``probability`` as float32, in [0, 1] up to rounding."""
    array = np.asarray(probability)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{function}: probability must be floating point, got {array.dtype}")
    # written so that NaN fails it
    if array.size and not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        raise ValueError(
            f"{function}: probability must be in [0, 1], got {array.min()} to {array.max()}"
        )
    return array.astype(np.float32, copy=False)


def overlap_table(a: IntArray, b: IntArray) -> sparse.coo_array:
    """Pixels of each pair of ids that meet, [max(a) + 1, max(b) + 1], where the second is > 0."""
    cells = b > 0
    table = sparse.coo_array(
        (np.ones(int(cells.sum()), np.int64), (a[cells], b[cells])),
        (int(a.max(initial=0)) + 1, int(b.max(initial=0)) + 1),
    )
    table.sum_duplicates()
    return table
