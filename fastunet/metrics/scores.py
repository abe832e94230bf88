"""All scores of a page in one, and their means over pages."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from .cells import (
    AP_THRESHOLDS,
    InstanceMethod,
    adapted_rand_error,
    average_precision,
    instances,
    segmentation_accuracy,
    variation_of_information,
)
from .challenge import (
    SplitMerge,
    information_score,
    maximal,
    rand_score,
    thin_borders,
    threshold_curves,
    warping_error,
)
from .labels import FloatArray, IntArray, as_labels, as_probability
from .pixels import dice, iou, pixel_error


@dataclass(frozen=True)
class Challenge:
    """The EM challenge's scores that take more than a segmentation: see ``metrics.challenge``.

    ``v_rand`` and ``v_info`` hold the scores after thinning by the threshold ("0.5"), of which the
    challenge takes the ``maximal`` one.
    """

    v_rand: dict[str, SplitMerge]
    v_info: dict[str, SplitMerge]
    warping_error: float


@dataclass(frozen=True)
class Scores:
    """The scores of one page, or their means over pages.

    ``iou`` and ``dice`` hold one number a class, background first; ``average_precision`` is keyed
    by the IoU threshold ("0.50"); ``v_rand`` and ``v_info`` are of the instances after thinning;
    the counts of instances are whole numbers for one page. ``challenge`` is None unless asked for.
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
    segmentation_accuracy: float
    v_rand: SplitMerge
    v_info: SplitMerge
    true_instances: float
    predicted_instances: float
    challenge: Challenge | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores by name, as ``json.dumps`` takes them."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


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
    challenge: bool = False,
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
        challenge: also score as the EM challenge does, over thresholds and by warping; takes half a
            second for 512x512 pixels.
    Returns: the page's scores.
    Raises: ValueError or TypeError, naming the argument, for shapes that differ, probabilities
        outside [0, 1] or NaN, and labels that are no class or instance ids.
    """
    classes, foreground, n_classes = _classes_and_foreground(predicted, n_classes)
    truth = as_labels("score", "true_classes", true_classes)
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
    thinned = thin_borders(found)
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
        segmentation_accuracy=segmentation_accuracy(found, cells),
        v_rand=rand_score(thinned, cells),
        v_info=information_score(thinned, cells),
        true_instances=float(np.count_nonzero(np.unique(cells))),
        predicted_instances=float(np.count_nonzero(np.unique(found))),
        challenge=Challenge(
            *threshold_curves(foreground, cells),
            warping_error(foreground, truth, threshold=threshold),
        )
        if challenge
        else None,
    )


def summarise(pages: Sequence[Scores]) -> Scores:
    """The mean of every score over pages, each page counting the same.

    Only ``segmentation_accuracy`` is the mean over all true cells, as in its challenge. Curves are
    means at each threshold, so that the maximal one has a single threshold for all pages, as in
    the EM challenge.

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
    names = [field.name for field in fields(Scores)]
    mean = Scores(**{name: _mean([getattr(page, name) for page in pages]) for name in names})
    cells = [page.true_instances for page in pages]
    if not any(cells):
        return mean
    accuracy = np.average([page.segmentation_accuracy for page in pages], weights=cells)
    return replace(mean, segmentation_accuracy=float(accuracy))


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of what holds them, part by part."""
    first = values[0]
    if isinstance(first, Challenge):
        return Challenge(*(_mean(part) for part in zip(*map(_parts, values), strict=True)))
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, SplitMerge):
        return SplitMerge(*(_mean(part) for part in zip(*values, strict=True)))
    if isinstance(first, tuple):
        return tuple(_mean(part) for part in zip(*values, strict=True))
    return None if first is None else float(np.mean(values))


def _parts(challenge: Challenge) -> tuple[Any, ...]:
    return challenge.v_rand, challenge.v_info, challenge.warping_error


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; the best of the challenge's curves comes with its threshold."""
    if isinstance(value, SplitMerge):
        return value._asdict()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if not isinstance(value, Challenge):
        return value
    best = {
        f"maximal_{name}": {"threshold": float(threshold), **score._asdict()}
        for name, curve in (("v_rand", value.v_rand), ("v_info", value.v_info))
        for threshold, score in [maximal(curve)]
    }
    curves = {"v_rand": _plain(value.v_rand), "v_info": _plain(value.v_info)}
    return {**best, "warping_error": value.warping_error, **curves}


def _classes_and_foreground(
    predicted: ArrayLike, n_classes: int | None
) -> tuple[IntArray, FloatArray, int | None]:
    """Classes [H, W], foreground probability [H, W] and K of a prediction of either kind."""
    array = np.asarray(predicted)
    if np.issubdtype(array.dtype, np.floating):
        p = as_probability("score", array)
        if p.ndim == 3 and len(p) > 1:
            return p.argmax(axis=0), 1 - p[0], len(p)
        if p.ndim == 2:
            return (p > 0.5).astype(np.uint8), p, 2
    elif array.ndim == 2:
        classes = as_labels("score", "predicted", array)
        return classes, (classes > 0).astype(np.float32), n_classes
    raise ValueError(
        "score: predicted must be probabilities [K, H, W] or [H, W] or integer classes [H, W], "
        f"got {list(array.shape)} {array.dtype}"
    )
