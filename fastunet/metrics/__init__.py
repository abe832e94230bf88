"""How good a segmentation is: scores of pixels, of cells, and those of the EM challenge.

Undefined cases follow one rule: what neither image contains is agreed on, so that a score of it
is 1 and an error of it 0. No function returns NaN.
"""

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
    CHALLENGE_THRESHOLDS,
    SplitMerge,
    information_score,
    maximal,
    rand_score,
    thin_borders,
    threshold_curves,
    warping_error,
)
from .pixels import dice, iou, pixel_error
from .scores import Challenge, Scores, score, summarise

__all__ = [
    "AP_THRESHOLDS",
    "CHALLENGE_THRESHOLDS",
    "Challenge",
    "InstanceMethod",
    "Scores",
    "SplitMerge",
    "adapted_rand_error",
    "average_precision",
    "dice",
    "information_score",
    "instances",
    "iou",
    "maximal",
    "pixel_error",
    "rand_score",
    "score",
    "segmentation_accuracy",
    "summarise",
    "thin_borders",
    "threshold_curves",
    "variation_of_information",
    "warping_error",
]
