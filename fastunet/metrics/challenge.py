"""Scores of the ISBI 2012 challenge on membranes in electron microscopy.

    p[s, t]  pixels of predicted segment s in true cell t, over all pixels of true cells
    p[s] = sum_t p[s, t],  q[t] = sum_s p[s, t]

    V_Rand:  split = sum p[s, t]^2 / sum q[t]^2,  merge = sum p[s, t]^2 / sum p[s]^2
    V_Info:  split = I(S; T) / H(S),              merge = I(S; T) / H(T)

and of both the harmonic mean of split and merge, all from 0 to 1 (best). A cell in pieces lowers
split, cells in one piece lower merge. Pixels of the true membrane do not count. Pixels of the
predicted membrane that lie in true cells are segments of one pixel each, whereas
``adapted_rand_error`` takes them for one segment, as scikit-image does.

Source: Arganda-Carreras et al. 2015, equations 3 to 6; Jain et al. 2010 for warping.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from .labels import IntArray, as_labels, as_probability, instance_pair, overlap_table

# those of the challenge's own program, from all membrane to none
CHALLENGE_THRESHOLDS = tuple(tenth / 10 for tenth in range(11))

# the eight pixels around one, row by row
AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
EIGHT_CONNECTED = np.ones((3, 3), bool)


class SplitMerge(NamedTuple):
    """A score, the harmonic mean of what splits and what merges leave of it; 1 is best."""

    score: float
    split: float
    merge: float


def thin_borders(instances: ArrayLike) -> IntArray:
    """Grow segments until lines of single pixels part them, as the challenge does before scoring.

    A watershed of a flat page from the segments, by 4-neighbours: all grow at one speed. Widths
    of membranes, which people draw differently, then play no part. Two segments that touch stay
    as they are, and one that is alone fills the page.

    Args:
        instances: [H, W] integer ids, 0 for background.
    Returns: [H, W] int32 ids, 0 on the lines; all 0 without a segment.
    Raises: ValueError if an id is negative or the page is not 2-d; TypeError if not integers.
    Source: Arganda-Carreras et al. 2015; the watershed is scikit-image's.
    """
    segments = as_labels("thin_borders", "instances", instances)
    if segments.ndim != 2:
        raise ValueError(f"thin_borders: instances must be [H, W], got {list(segments.shape)}")
    if not segments.any():
        return np.zeros(segments.shape, np.int32)
    _, numbers = np.unique(np.append(segments, 0), return_inverse=True)
    seeds = numbers[:-1].reshape(segments.shape)
    return watershed(np.zeros(segments.shape, np.uint8), seeds, watershed_line=True)


def rand_score(predicted_instances: ArrayLike, true_instances: ArrayLike) -> SplitMerge:
    """V_Rand, the foreground-restricted Rand score, of a segmentation as it is given.

    The challenge thins its borders before: ``rand_score(thin_borders(predicted), true)``.

    Args:
        predicted_instances: integer segment ids, 0 for membrane, any shape.
        true_instances: ids of the same shape.
    Returns: score, split and merge; 1 where the truth has no cell.
    Raises: ValueError if shapes differ or an id is negative; TypeError if not integers.
    Source: Arganda-Carreras et al. 2015, equations 3 and 4.
    """
    a, b = instance_pair("rand_score", predicted_instances, true_instances)
    if not b.any():
        return SplitMerge(1.0, 1.0, 1.0)
    both, predicted, true = (
        float(np.sum(np.square(pixels, dtype=np.float64))) for pixels in _pixel_counts(a, b)
    )
    return SplitMerge(2 * both / (predicted + true), both / true, both / predicted)


def information_score(predicted_instances: ArrayLike, true_instances: ArrayLike) -> SplitMerge:
    """V_Info, the foreground-restricted information score, of a segmentation as it is given.

    The challenge thins its borders before: ``information_score(thin_borders(predicted), true)``.

    Args:
        predicted_instances: integer segment ids, 0 for membrane, any shape.
        true_instances: ids of the same shape.
    Returns: score, split and merge. Split is 1 where all is predicted to be one segment, and merge
        where all true pixels are of one cell, or of none: there is nothing to split or merge.
    Raises: ValueError if shapes differ or an id is negative; TypeError if not integers.
    Source: Arganda-Carreras et al. 2015, equations 5 and 6.
    """
    a, b = instance_pair("information_score", predicted_instances, true_instances)
    if not b.any():
        return SplitMerge(1.0, 1.0, 1.0)
    both, predicted, true = (_entropy(pixels) for pixels in _pixel_counts(a, b))
    # rounding may leave -1e-16, or more than there is to share
    shared = min(max(predicted + true - both, 0.0), predicted, true)
    whole = predicted + true
    return SplitMerge(
        2 * shared / whole if whole else 1.0,
        shared / predicted if predicted else 1.0,
        shared / true if true else 1.0,
    )


def threshold_curves(
    foreground_probability: ArrayLike,
    true_instances: ArrayLike,
    thresholds: Sequence[float] = CHALLENGE_THRESHOLDS,
) -> tuple[dict[str, SplitMerge], dict[str, SplitMerge]]:
    """V_Rand and V_Info at each threshold, after thinning; the challenge takes the ``maximal`` one.

    At a threshold the segments are the 4-connected components of p above it.

    Args:
        foreground_probability: [H, W] float, the probability that a pixel is inside a cell.
        true_instances: [H, W] integer ids, 0 for membrane.
        thresholds: where p is cut.
    Returns: V_Rand and V_Info by threshold ("0.5").
    Raises: ValueError if shapes differ, an id is negative, or the probability is outside [0, 1] or
        NaN; TypeError for other types.
    Source: Arganda-Carreras et al. 2015.
    """
    p = as_probability("threshold_curves", foreground_probability)
    rand, information = {}, {}
    for threshold in thresholds:
        segments = thin_borders(ndimage.label(p > threshold)[0])
        rand[f"{threshold:.1f}"] = rand_score(segments, true_instances)
        information[f"{threshold:.1f}"] = information_score(segments, true_instances)
    return rand, information


def maximal(curve: Mapping[str, SplitMerge]) -> tuple[str, SplitMerge]:
    """The best score of a curve and the lowest threshold that gives it.

    Args:
        curve: scores by threshold, at least one.
    Returns: the threshold and its score.
    """
    threshold = max(curve, key=lambda name: curve[name].score)
    return threshold, curve[threshold]


def warping_error(
    foreground_probability: ArrayLike, true: ArrayLike, *, threshold: float = 0.5
) -> float:
    """The share of pixels that are still wrong after the truth was bent towards the prediction.

    Bending flips true pixels that differ from the prediction and are simple: no cell (4-connected)
    and no piece of background (8-connected, as all around the page) appears, vanishes, joins or
    parts. Pixels are tried in order of ``|p - threshold|``, the surest first, again and again until
    none can be flipped. So a border that is too thick or thin, or has moved by no more than its
    width, costs nothing, and what is left are gaps, walls, cells and holes that are not in the
    truth, or are missing. Finding the least number is hard; like the challenge's program this finds
    one that no further flip lowers.

    Args:
        foreground_probability: [H, W] float, the probability that a pixel is inside a cell.
        true: [H, W] integer or bool, above 0 inside cells.
        threshold: predicted to be inside above it.
    Returns: from 0 (the same topology) to 1; 0 for a page without pixels.
    Raises: ValueError if the shapes differ or are not 2-d, or the probability is outside [0, 1] or
        NaN; TypeError for other types.
    Source: Jain et al. 2010; simple points by Bertrand and Malandain 1994.
    """
    p = as_probability("warping_error", foreground_probability)
    inside = as_labels("warping_error", "true", true) > 0
    if p.shape != inside.shape or p.ndim != 2:
        raise ValueError(
            "warping_error: probability and true must have one shape [H, W], "
            f"got {list(p.shape)} and {list(inside.shape)}"
        )
    rows, columns = np.nonzero((p > threshold) != inside)
    surest = np.argsort(-np.abs(p[rows, columns] - threshold), kind="stable")
    width = inside.shape[1] + 2
    wrong = ((rows + 1) * width + columns + 1)[surest].tolist()
    # a million looks at nine pixels: bytes are faster than an array
    bent = bytearray(np.pad(inside, 1).tobytes())
    steps, simple = [i * width + j for i, j in AROUND], _simple_points()
    while True:
        stuck = []
        for at in wrong:
            pattern = 0
            for step in steps:
                pattern = 2 * pattern + bent[at + step]
            if simple[pattern]:
                bent[at] ^= 1
            else:
                stuck.append(at)
        if len(stuck) == len(wrong):
            return len(stuck) / max(inside.size, 1)
        wrong = stuck


def _pixel_counts(
    a: IntArray, b: IntArray
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of true cells by (segment, cell), by segment and by cell; none is 0."""
    table = overlap_table(a, b)
    membrane = table.row == 0
    # each pixel of the predicted membrane is a segment of its own
    alone = np.ones(int(table.data[membrane].sum()), np.int64)
    both = np.concatenate([table.data[~membrane], alone])
    segments = np.bincount(table.row[~membrane], table.data[~membrane]).astype(np.int64)
    cells = np.bincount(table.col, table.data).astype(np.int64)
    return both, np.concatenate([segments[segments > 0], alone]), cells[cells > 0]


def _entropy(pixels: NDArray[np.int64]) -> float:
    share = pixels / pixels.sum()
    return float(-np.sum(share * np.log2(share)))


@cache
def _simple_points() -> tuple[bool, ...]:
    """Whether a pixel is simple, by the 256 patterns of the eight around it."""
    simple = []
    for pattern in range(256):
        inside = np.zeros((3, 3), bool)
        outside = np.zeros((3, 3), bool)
        for bit, (i, j) in enumerate(AROUND):
            value = bool(pattern >> (7 - bit) & 1)
            inside[1 + i, 1 + j], outside[1 + i, 1 + j] = value, not value
        cells = ndimage.label(inside)[0]
        # of the cells' pieces those count that touch the pixel along an edge
        touching = np.unique(cells[[0, 1, 1, 2], [1, 0, 2, 1]])
        background = ndimage.label(outside, EIGHT_CONNECTED)[1]
        simple.append(np.count_nonzero(touching) == 1 and background == 1)
    return tuple(simple)
