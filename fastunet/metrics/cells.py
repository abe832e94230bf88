"""Cells: how they are told apart, and scores of each and of their pairs of pixels."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, sparse
from skimage import metrics as skimage_metrics
from skimage.segmentation import watershed

from .labels import IntArray, as_probability, instance_pair, overlap_table, ratio

InstanceMethod = Literal["components", "watershed"]

AP_THRESHOLDS = tuple(percent / 100 for percent in range(50, 95, 5))


def instances(
    probability: ArrayLike,
    *,
    method: InstanceMethod = "components",
    threshold: float = 0.5,
    seed_threshold: float = 0.8,
    smooth_px: float = 2.0,
    border_class: int | None = None,
) -> NDArray[np.int32]:
    """Number the cells of a page.

    "components": the 4-connected components of p > threshold. One leaking pixel joins two cells.
    "watershed": seeds are the components of p, smoothed by a Gaussian, above ``seed_threshold``;
    they flood -p inside p > threshold, so that cells part where p is lowest between them. Where a
    class of its own is the border between cells, it counts as inside, and seeds and floods are of
    the probability of a cell minus that of a border.

    Args:
        probability: [H, W] float, that a pixel is inside a cell, or [K, H, W] of each class, of
            which 0 is the background.
        method: "components" or "watershed".
        threshold: pixels at or below it are background.
        seed_threshold: of the watershed's seeds; higher parts more cells and drops faint ones.
        smooth_px: standard deviation of the Gaussian before seeding, in pixels.
        border_class: the class of borders between cells, for the watershed.
    Returns: [H, W] int32; 0 is background, k > 0 the k-th cell.
    Raises: ValueError if the page has other axes, holds values outside [0, 1] or NaN, the method is
        unknown, or there is no such border class or it is not for the watershed.
    Source: the watershed is scikit-image's.
    """
    p = as_probability("instances", probability)
    if p.ndim not in (2, 3) or 0 in p.shape[:-2]:
        raise ValueError(f"instances: probability must be [H, W] or [K, H, W], got {list(p.shape)}")
    foreground = p if p.ndim == 2 else p[0] if len(p) == 1 else 1 - p[0]
    if method not in get_args(InstanceMethod):
        raise ValueError(f"instances: method must be components or watershed, got {method!r}")
    core = foreground
    if border_class is not None:
        classes = len(p) if p.ndim == 3 else 2
        if method != "watershed" or classes < 3 or not 0 < border_class < classes:
            raise ValueError(
                "instances: border_class must be of three classes or more, above 0, and for the "
                f"watershed, got {border_class} of {classes} for {method}"
            )
        # the foreground is cell and border
        core = foreground - 2 * p[border_class]
    inside = foreground > threshold
    if method == "components":
        return ndimage.label(inside)[0]
    seeds = ndimage.label((ndimage.gaussian_filter(core, smooth_px) > seed_threshold) & inside)[0]
    return watershed(-core, seeds, mask=inside)


def adapted_rand_error(predicted_instances: ArrayLike, true_instances: ArrayLike) -> float:
    """One minus the F-score of "do these two pixels lie in one cell?" over all pairs of pixels.

    Pixels that are background (0) in the truth do not count; the prediction's background is one
    more segment, as in scikit-image.

    Args:
        predicted_instances: integer instance ids, 0 for background, any shape.
        true_instances: ids of the same shape.
    Returns: from 0 (best) to 1; 0 where no segment of either has two pixels to pair.
    Raises: ValueError if shapes differ or an id is negative; TypeError if not integers.
    Source: Arganda-Carreras et al. 2015; ``skimage.metrics.adapted_rand_error``.
    """
    a, b = instance_pair("adapted_rand_error", predicted_instances, true_instances)
    if not b.any():
        return 0.0
    # precision and recall, not returned, are 0 / 0 where all segments of one image are pixels
    with np.errstate(invalid="ignore"):
        error = skimage_metrics.adapted_rand_error(b, a, ignore_labels=(0,))[0]
    return 0.0 if np.isnan(error) else float(error)


def variation_of_information(
    predicted_instances: ArrayLike, true_instances: ArrayLike
) -> tuple[float, float]:
    """How much the prediction splits true cells and how much it merges them, in bits.

    Pixels that are background (0) in the truth do not count; the prediction's background is one
    more segment, as for ``adapted_rand_error``.

    Args:
        predicted_instances: integer instance ids, 0 for background, any shape.
        true_instances: ids of the same shape.
    Returns: (split, merge): the conditional entropies H(predicted | true) and H(true | predicted),
        from 0 (best); both 0 where the truth has no cell.
    Raises: ValueError if shapes differ or an id is negative; TypeError if not integers.
    Source: Meila 2007; ``skimage.metrics.variation_of_information``.
    """
    a, b = instance_pair("variation_of_information", predicted_instances, true_instances)
    if not b.any():
        return 0.0, 0.0
    split, merge = skimage_metrics.variation_of_information(b, a, ignore_labels=(0,))
    # rounding may leave -1e-16
    return max(0.0, float(split)), max(0.0, float(merge))


def average_precision(
    predicted_instances: ArrayLike,
    true_instances: ArrayLike,
    thresholds: Sequence[float] = AP_THRESHOLDS,
) -> NDArray[np.float64]:
    """TP / (TP + FP + FN) over instances at each IoU threshold.

    A predicted instance is a true positive if its IoU with a true one is above the threshold;
    from 0.5 on there is at most one such partner, so that no matching is needed.

    Args:
        predicted_instances: integer instance ids, 0 for background, any shape.
        true_instances: ids of the same shape.
        thresholds: IoU thresholds t, 0.5 <= t < 1.
    Returns: [len(thresholds)] float64; 1 where neither image has an instance.
    Raises: ValueError if shapes differ, an id is negative or a threshold is outside [0.5, 1);
        TypeError if not integers.
    Source: Data Science Bowl 2018, Caicedo et al. 2019.
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    if not np.all((levels >= 0.5) & (levels < 1)):
        raise ValueError(f"average_precision: thresholds must be in [0.5, 1), got {thresholds}")
    a, b = instance_pair("average_precision", predicted_instances, true_instances)
    area_a, area_b, overlap = _overlaps(a, b)
    union = area_a[overlap.row] + area_b[overlap.col] - overlap.data
    hits = (overlap.data / union > levels[:, None]).sum(axis=1)
    return ratio(hits, np.count_nonzero(area_a[1:]) + np.count_nonzero(area_b[1:]) - hits)


def segmentation_accuracy(predicted_instances: ArrayLike, true_instances: ArrayLike) -> float:
    """SEG of the Cell Tracking Challenge: how well each true cell is covered by its partner.

    The partner of a true cell is the predicted one that covers more than half of it, of which
    there is at most one; the score is the mean over true cells of their IoU with the partner, or 0
    without one. Cells that are predicted beside the true ones cost nothing.

    Args:
        predicted_instances: integer instance ids, 0 for background, any shape.
        true_instances: ids of the same shape.
    Returns: from 0 to 1 (best); 1 where the truth has no cell.
    Raises: ValueError if shapes differ or an id is negative; TypeError if not integers.
    Source: Ulman et al. 2017; Maska et al. 2014.
    """
    a, b = instance_pair("segmentation_accuracy", predicted_instances, true_instances)
    area_a, area_b, overlap = _overlaps(a, b)
    partners = 2 * overlap.data > area_b[overlap.col]
    union = area_a[overlap.row] + area_b[overlap.col] - overlap.data
    true_cells = np.count_nonzero(area_b[1:])
    return float(np.sum((overlap.data / union)[partners]) / true_cells) if true_cells else 1.0


def _overlaps(a: IntArray, b: IntArray) -> tuple[IntArray, IntArray, sparse.coo_array]:
    """Pixels of each instance of either image, and of each pair that meets."""
    overlap = overlap_table(np.where(b > 0, a, 0), np.where(a > 0, b, 0))
    return np.bincount(a.ravel(), minlength=1), np.bincount(b.ravel(), minlength=1), overlap
