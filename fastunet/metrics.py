"""How good a segmentation is: pixel scores, and scores over instances (cells).

Undefined cases follow one rule: what neither image contains is agreed on, so that a score of it
is 1 and an error of it 0. No function returns NaN.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, sparse
from skimage import metrics as skimage_metrics
from skimage.segmentation import watershed

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float32]
InstanceMethod = Literal["components", "watershed"]

AP_THRESHOLDS = tuple(percent / 100 for percent in range(50, 95, 5))


@dataclass(frozen=True)
class Scores:
    """The scores of one page, or their means over pages.

    ``iou`` and ``dice`` hold one number a class, background first; ``average_precision`` is keyed
    by the IoU threshold ("0.50"); the counts of instances are whole numbers for one page.
    """

    pixel_error: float
    iou: tuple[float, ...]
    mean_iou: float
    dice: tuple[float, ...]
    adapted_rand_error: float
    vi_split: float
    vi_merge: float
    average_precision: dict[str, float]
    mean_average_precision: float
    true_instances: float
    predicted_instances: float

    def to_dict(self) -> dict[str, Any]:
        """The scores by name, as ``json.dumps`` takes them."""
        return asdict(self)


def pixel_error(predicted: ArrayLike, true: ArrayLike) -> float:
    """The share of pixels whose class is wrong.

    Args:
        predicted: integer or bool classes, any shape.
        true: classes of the same shape.
    Returns: from 0 to 1; 0 for a page without pixels.
    Raises: ValueError if shapes differ or a class is negative; TypeError if not integers.
    Source: Arganda-Carreras et al. 2015.
    """
    a, b = _label_pair("pixel_error", predicted, true)
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
    return _ratio(both, predicted_px + true_px - both)


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
    return _ratio(2 * both, predicted_px + true_px)


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
    a, b = _instance_pair("adapted_rand_error", predicted_instances, true_instances)
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
    a, b = _instance_pair("variation_of_information", predicted_instances, true_instances)
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
    a, b = _instance_pair("average_precision", predicted_instances, true_instances)
    area_a, area_b = np.bincount(a.ravel(), minlength=1), np.bincount(b.ravel(), minlength=1)
    cells = (a > 0) & (b > 0)
    overlap = sparse.coo_array(
        (np.ones(int(cells.sum()), np.int64), (a[cells], b[cells])), (area_a.size, area_b.size)
    )
    overlap.sum_duplicates()
    union = area_a[overlap.row] + area_b[overlap.col] - overlap.data
    hits = (overlap.data / union > levels[:, None]).sum(axis=1)
    return _ratio(hits, np.count_nonzero(area_a[1:]) + np.count_nonzero(area_b[1:]) - hits)


def instances(
    foreground_probability: ArrayLike,
    *,
    method: InstanceMethod = "components",
    threshold: float = 0.5,
    seed_threshold: float = 0.8,
    smooth_px: float = 2.0,
) -> NDArray[np.int32]:
    """Number the cells of a page.

    "components": the 4-connected components of p > threshold. One leaking pixel joins two cells.
    "watershed": seeds are the components of p, smoothed by a Gaussian, above ``seed_threshold``;
    they flood -p inside p > threshold, so that cells part where p is lowest between them.

    Args:
        foreground_probability: [H, W] float, the probability that a pixel is inside a cell.
        method: "components" or "watershed".
        threshold: pixels at or below it are background.
        seed_threshold: of the watershed's seeds; higher parts more cells and drops faint ones.
        smooth_px: standard deviation of the Gaussian before seeding, in pixels.
    Returns: [H, W] int32; 0 is background, k > 0 the k-th cell.
    Raises: ValueError if the page is not 2-d, holds values outside [0, 1] or NaN, or the method
        is unknown.
    Source: the watershed is scikit-image's.
    """
    p = _probability("instances", foreground_probability)
    if p.ndim != 2:
        raise ValueError(f"instances: probability must be [H, W], got {list(p.shape)}")
    inside = p > threshold
    if method == "components":
        return ndimage.label(inside)[0]
    if method != "watershed":
        raise ValueError(f"instances: method must be components or watershed, got {method!r}")
    seeds = ndimage.label((ndimage.gaussian_filter(p, smooth_px) > seed_threshold) & inside)[0]
    return watershed(-p, seeds, mask=inside)


def score(
    predicted: ArrayLike,
    true_classes: ArrayLike,
    true_instances: ArrayLike | None = None,
    *,
    n_classes: int | None = None,
    method: InstanceMethod = "components",
    threshold: float = 0.5,
    seed_threshold: float = 0.8,
    smooth_px: float = 2.0,
) -> Scores:
    """Score one page.

    Pixel scores compare the most probable class; instance scores compare ``instances`` of the
    foreground, 1 minus the background's probability, with the true ones.

    Args:
        predicted: probabilities [K, H, W] or, of the foreground, [H, W], floating point; or
            integer classes [H, W].
        true_classes: [H, W] integer or bool classes.
        true_instances: [H, W] integer ids, 0 for background; by default the 4-connected components
            of ``true_classes > 0``.
        n_classes: K where ``predicted`` holds classes, as for ``iou``.
        method: as for ``instances``, like the next three; they do not change the pixel scores.
        threshold: see ``instances``.
        seed_threshold: see ``instances``.
        smooth_px: see ``instances``.
    Returns: the page's scores.
    Raises: ValueError or TypeError, naming the argument, for shapes that differ, probabilities
        outside [0, 1] or NaN, and labels that are no class or instance ids.
    """
    classes, foreground, n_classes = _classes_and_foreground(predicted, n_classes)
    truth = _labels("score", "true_classes", true_classes)
    cells = ndimage.label(truth > 0)[0] if true_instances is None else np.asarray(true_instances)
    found = instances(
        foreground,
        method=method,
        threshold=threshold,
        seed_threshold=seed_threshold,
        smooth_px=smooth_px,
    )
    class_iou = iou(classes, truth, n_classes=n_classes)
    split, merge = variation_of_information(found, cells)
    precision = average_precision(found, cells)
    return Scores(
        pixel_error=pixel_error(classes, truth),
        iou=tuple(class_iou.tolist()),
        mean_iou=float(class_iou.mean()),
        dice=tuple(dice(classes, truth, n_classes=n_classes).tolist()),
        adapted_rand_error=adapted_rand_error(found, cells),
        vi_split=split,
        vi_merge=merge,
        average_precision={
            f"{t:.2f}": float(value) for t, value in zip(AP_THRESHOLDS, precision, strict=True)
        },
        mean_average_precision=float(precision.mean()),
        true_instances=float(np.count_nonzero(np.unique(cells))),
        predicted_instances=float(np.count_nonzero(np.unique(found))),
    )


def summarise(pages: Sequence[Scores]) -> Scores:
    """The mean of every score over pages, each page counting the same.

    Args:
        pages: at least one page's scores, all of the same number of classes.
    Returns: the means; counts of instances become counts a page.
    Raises: ValueError if there is no page or the numbers of classes differ.
    """
    if not pages:
        raise ValueError("summarise: pages must hold at least one page's scores, got none")
    class_counts = sorted({len(page.iou) for page in pages})
    if len(class_counts) > 1:
        raise ValueError(f"summarise: pages must have one number of classes, got {class_counts}")

    def mean(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: mean([value[key] for value in values]) for key in first}
        if isinstance(first, tuple):
            return tuple(mean(column) for column in zip(*values, strict=True))
        return float(np.mean(values))

    return Scores(**{name: mean([getattr(p, name) for p in pages]) for name in asdict(pages[0])})


def _labels(function: str, name: str, labels: ArrayLike) -> IntArray:
    """``labels`` as non-negative integers."""
    array = np.asarray(labels)
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{function}: {name} must be integers or bool, got {array.dtype}")
    if array.size and array.min() < 0:
        raise ValueError(f"{function}: {name} must not be negative, got {array.min()}")
    return array


def _label_pair(function: str, predicted: ArrayLike, true: ArrayLike) -> tuple[IntArray, IntArray]:
    a, b = _labels(function, "predicted", predicted), _labels(function, "true", true)
    if a.shape != b.shape:
        raise ValueError(
            f"{function}: predicted and true must have one shape, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    return a, b


def _instance_pair(
    function: str, predicted: ArrayLike, true: ArrayLike
) -> tuple[IntArray, IntArray]:
    a, b = _label_pair(function, predicted, true)
    return _compact(a), _compact(b)


def _compact(ids: IntArray) -> IntArray:
    """Rename ids so that tables indexed by them stay smaller than the page; 0 stays 0."""
    if not ids.size or ids.max() <= ids.size:
        return ids.astype(np.int64)
    # the appended 0 makes 0 the first of the sorted ids
    with_zero = np.append(ids, np.zeros(1, ids.dtype))
    return np.unique(with_zero, return_inverse=True)[1][:-1].reshape(ids.shape)


def _class_areas(
    function: str, predicted: ArrayLike, true: ArrayLike, n_classes: int | None
) -> tuple[IntArray, IntArray, IntArray]:
    """Pixels of each class in both, in the prediction and in the truth, [K] each."""
    a, b = _label_pair(function, predicted, true)
    found = 1 + max((int(x.max()) for x in (a, b) if x.size), default=0)
    if n_classes is not None and found > n_classes:
        raise ValueError(f"{function}: classes must be < {n_classes}, got {found - 1}")
    count = n_classes or max(2, found)
    a, b = a.ravel(), b.ravel()
    both, predicted_px, true_px = (np.bincount(x, minlength=count) for x in (a[a == b], a, b))
    return both, predicted_px, true_px


def _ratio(part: IntArray, whole: IntArray) -> NDArray[np.float64]:
    """``part / whole``, and 1 where both are 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def _probability(function: str, probability: ArrayLike) -> FloatArray:
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


def _classes_and_foreground(
    predicted: ArrayLike, n_classes: int | None
) -> tuple[IntArray, FloatArray, int | None]:
    """Classes [H, W], foreground probability [H, W] and K of a prediction of either kind."""
    array = np.asarray(predicted)
    if np.issubdtype(array.dtype, np.floating):
        p = _probability("score", array)
        if p.ndim == 3 and len(p) > 1:
            return p.argmax(axis=0), 1 - p[0], len(p)
        if p.ndim == 2:
            return (p > 0.5).astype(np.uint8), p, 2
    elif array.ndim == 2:
        classes = _labels("score", "predicted", array)
        return classes, (classes > 0).astype(np.float32), n_classes
    raise ValueError(
        "score: predicted must be probabilities [K, H, W] or [H, W] or integer classes [H, W], "
        f"got {list(array.shape)} {array.dtype}"
    )
