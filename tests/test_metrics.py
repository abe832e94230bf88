"""Scores against implementations that follow the definitions pixel by pixel."""

import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, product
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from fastunet import metrics

ISBI = Path(__file__).parents[1].parent / "shared" / "data" / "isbi2012"

Labels = NDArray[np.int64]
PAIR_FUNCTIONS = (
    metrics.pixel_error,
    metrics.iou,
    metrics.dice,
    metrics.adapted_rand_error,
    metrics.variation_of_information,
    metrics.average_precision,
)


@st.composite
def label_pairs(draw: st.DrawFn) -> tuple[Labels, Labels]:
    """Two label images of one small shape, few labels, alike in most pixels."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    true = rng.integers(0, draw(st.integers(1, 5)), shape)
    other = rng.integers(0, draw(st.integers(1, 5)), shape)
    keep = rng.random(shape) < draw(st.sampled_from([0.0, 0.7, 0.95]))
    return np.where(keep, true, other), true


def brute_adapted_rand(predicted: Labels, true: Labels) -> float:
    pixels = [(p, t) for p, t in zip(predicted.ravel(), true.ravel(), strict=True) if t]
    same_p = same_t = both = 0
    for (p, t), (q, u) in combinations(pixels, 2):
        same_p += int(p == q)
        same_t += int(t == u)
        both += int(p == q and t == u)
    return 1 - 2 * both / (same_p + same_t) if same_p + same_t else 0.0


def brute_variation(predicted: Labels, true: Labels) -> tuple[float, float]:
    pixels = [(p, t) for p, t in zip(predicted.ravel(), true.ravel(), strict=True) if t]
    joint, of_p, of_t = (
        Counter(pixels),
        Counter(p for p, _ in pixels),
        Counter(t for _, t in pixels),
    )
    split = -sum(n / len(pixels) * log2(n / of_t[t]) for (_, t), n in joint.items())
    merge = -sum(n / len(pixels) * log2(n / of_p[p]) for (p, _), n in joint.items())
    return split, merge


def brute_average_precision(predicted: Labels, true: Labels, threshold: float) -> float:
    predicted_ids, true_ids = (sorted(set(x.ravel().tolist()) - {0}) for x in (predicted, true))
    hits = 0
    for p, t in product(predicted_ids, true_ids):
        a, b = predicted == p, true == t
        hits += Fraction(int((a & b).sum()), int((a | b).sum())) > Fraction(str(threshold))
    whole = len(predicted_ids) + len(true_ids) - hits
    return hits / whole if whole else 1.0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(label_pairs())
def test_pixel_scores(pair: tuple[Labels, Labels]) -> None:
    predicted, true = pair
    assert metrics.pixel_error(*pair) == pytest.approx(
        np.count_nonzero(predicted != true) / true.size
    )
    overlap, twice = metrics.iou(*pair, n_classes=6), metrics.dice(*pair, n_classes=6)
    for c in range(6):
        a = {i for i, v in enumerate(predicted.ravel()) if v == c}
        b = {i for i, v in enumerate(true.ravel()) if v == c}
        assert overlap[c] == pytest.approx(len(a & b) / len(a | b) if a | b else 1)
        assert twice[c] == pytest.approx(2 * len(a & b) / (len(a) + len(b)) if a | b else 1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(label_pairs())
def test_instance_scores(pair: tuple[Labels, Labels]) -> None:
    assert metrics.adapted_rand_error(*pair) == pytest.approx(brute_adapted_rand(*pair), abs=1e-12)
    assert metrics.variation_of_information(*pair) == pytest.approx(
        brute_variation(*pair), abs=1e-12
    )
    # exact: the same quotient of the same integers
    brute = [brute_average_precision(*pair, t) for t in metrics.AP_THRESHOLDS]
    assert metrics.average_precision(*pair).tolist() == brute


def test_average_precision_needs_more_than_the_threshold() -> None:
    true = np.zeros((1, 10), np.int32)
    true[:, :7] = 1
    assert metrics.average_precision(np.ones((1, 10), np.int32), true, (0.65, 0.7)).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64])
def test_names_of_instances_do_not_matter(dtype: type) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 8, 8))
    names: NDArray[Any] = np.array([0, 91, 17, np.iinfo(dtype).max, 3], dtype)
    for function in PAIR_FUNCTIONS[3:]:
        expected: Any = function(a, b)
        assert np.array_equal(function(names[a], names[b]), expected)


def test_what_neither_image_contains_is_agreed_on() -> None:
    nothing, cell = np.zeros((4, 4), np.int32), np.eye(4, dtype=np.int32)
    for empty in (nothing, np.zeros((0, 4), np.int32)):
        assert metrics.pixel_error(empty, empty) == 0
        assert metrics.iou(empty, empty, n_classes=3).tolist() == [1, 1, 1]
        assert metrics.dice(empty, empty).tolist() == [1, 1]
        assert metrics.adapted_rand_error(empty, empty) == 0
        assert metrics.variation_of_information(empty, empty) == (0, 0)
        assert metrics.average_precision(empty, empty).tolist() == [1] * 9
    # truth without a cell: nothing to split or merge, but every instance found is wrong
    assert metrics.adapted_rand_error(cell, nothing) == 0
    assert metrics.variation_of_information(cell, nothing) == (0, 0)
    assert metrics.average_precision(cell, nothing).tolist() == [0] * 9
    # truth of single pixels merged by the prediction, and one pixel alone
    assert metrics.adapted_rand_error(cell, np.arange(16).reshape(4, 4)) == 1
    assert metrics.adapted_rand_error(np.ones((1, 1), int), np.ones((1, 1), int)) == 0


def brute_components(inside: NDArray[np.bool_]) -> int:
    left, count = set(zip(*np.nonzero(inside), strict=True)), 0
    while left:
        stack, count = [left.pop()], count + 1
        while stack:
            i, j = stack.pop()
            near = {(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)} & left
            left -= near
            stack.extend(near)
    return count


def test_components() -> None:
    rng = np.random.default_rng(1)
    p = rng.random((30, 40), dtype=np.float32)
    found = metrics.instances(p, threshold=0.45)
    assert found.dtype == np.int32
    assert np.array_equal(found > 0, p > 0.45)
    assert found.max() == brute_components(p > 0.45)
    # pixels that touch along an edge share their number, and only they
    assert all(brute_components(found == k) == 1 for k in range(1, int(found.max()) + 1))


def leaking_cells(shape: tuple[int, int] = (60, 60)) -> tuple[NDArray[np.float32], Labels]:
    """Four cells between thin membranes, of which one has a gap."""
    p = np.full(shape, 0.95, np.float32)
    p[29:31], p[:, 29:31] = 0.1, 0.1
    true = ndimage.label(p > 0.5)[0]
    p[10:13, 29:31] = 0.7
    return p, true


def test_watershed_parts_what_a_gap_joins() -> None:
    p, true = leaking_cells()
    assert metrics.instances(p).max() == 3
    found = metrics.instances(p, method="watershed")
    assert found.dtype == np.int32
    assert found.max() == 4
    assert np.array_equal(found > 0, p > 0.5)
    assert metrics.average_precision(found, true).min() == 1


def test_score_of_probabilities_and_of_classes() -> None:
    p, true = leaking_cells()
    two = metrics.score(np.stack([1 - p, p]), true > 0, true, method="watershed")
    assert two == metrics.score(p, true > 0, true, method="watershed")
    assert (two.true_instances, two.predicted_instances) == (4, 4)
    assert two.pixel_error == pytest.approx(6 / 3600)
    assert two.mean_iou == pytest.approx(sum(two.iou) / 2)
    assert two.mean_average_precision == 1
    # components of classes, the truth's cells found by score itself
    classes = metrics.score((p > 0.5).astype(np.uint8), true > 0)
    assert classes == metrics.score(p, true > 0, true)
    assert classes.adapted_rand_error > 0.1 > two.adapted_rand_error
    # a threshold of the instances leaves the pixel scores alone
    strict = metrics.score(p, true > 0, true, threshold=0.8)
    assert (strict.pixel_error, strict.predicted_instances) == (two.pixel_error, 4)


def test_score_of_three_classes() -> None:
    logits = np.random.default_rng(2).random((3, 20, 20), dtype=np.float32)
    p = np.exp(logits) / np.exp(logits).sum(0)
    scores = metrics.score(p, p.argmax(0))
    assert scores.pixel_error == 0
    assert scores.iou == (1, 1, 1)
    by_classes = metrics.score(p.argmax(0) * 0, p.argmax(0) * 0, n_classes=3)
    assert by_classes.iou == (1, 1, 1)


def test_summarise_and_json() -> None:
    p, true = leaking_cells()
    pages = [metrics.score(p, true > 0, true), metrics.score(np.zeros_like(p), true > 0, true)]
    mean = metrics.summarise(pages)
    assert mean.iou[1] == pytest.approx((pages[0].iou[1] + 0) / 2)
    assert mean.predicted_instances == 1.5
    assert mean.average_precision["0.50"] == pytest.approx(
        np.mean([page.average_precision["0.50"] for page in pages])
    )
    assert json.loads(json.dumps(mean.to_dict(), allow_nan=False))["average_precision"].keys() == {
        f"{t:.2f}" for t in metrics.AP_THRESHOLDS
    }
    assert metrics.summarise(pages[:1]) == pages[0]


@pytest.mark.skipif(not ISBI.is_dir(), reason=f"no {ISBI}")
def test_real_sections_against_themselves_and_noise() -> None:
    import tifffile

    inside = tifffile.imread(ISBI / "train-labels.tif", key=24) > 0
    cells = ndimage.label(inside)[0]
    perfect = metrics.score(inside.astype(np.uint8), inside, cells)
    assert perfect.adapted_rand_error == 0
    assert perfect.mean_average_precision == 1
    # membranes thinned by two pixels let cells leak into each other
    leaky = metrics.score(ndimage.binary_dilation(inside, iterations=2).astype(np.uint8), inside)
    assert leaky.pixel_error < 0.2 < leaky.adapted_rand_error
    assert leaky.vi_merge > leaky.vi_split


HALF = np.full((4, 4), 0.5, np.float32)
REJECTED: dict[str, Callable[[], object]] = {
    r"thresholds must be in \[0.5, 1\), got \(0.3,\)": lambda: metrics.average_precision(
        [[1]], [[1]], (0.3,)
    ),
    "iou: classes must be < 2, got 5": lambda: metrics.iou([5], [1], n_classes=2),
    r"instances: probability must be in \[0, 1\], got nan": lambda: metrics.instances(
        HALF * np.nan
    ),
    r"instances: probability must be in \[0, 1\], got -4": lambda: metrics.instances(HALF * -8),
    r"instances: probability must be .* or \[K, H, W\], got \[4\]": lambda: metrics.instances(
        HALF[0]
    ),
    "instances: method must be components or watershed, got 'x'": lambda: metrics.instances(
        HALF,
        method="x",  # type: ignore[arg-type]
    ),
    r"score: predicted must be probabilities .*, got \[1, 4, 4\]": lambda: metrics.score(
        HALF[None], HALF > 0
    ),
    r"one shape, got \[4, 4\] and \[2, 4\]": lambda: metrics.score(HALF, HALF[:2] > 0),
    r"one shape, got \[4, 4\] and \[1, 1\]": lambda: metrics.score(HALF, HALF > 0, [[1]]),
    "summarise: pages must hold at least one": lambda: metrics.summarise([]),
    r"summarise: pages must have one number of classes, got \[2, 3\]": lambda: metrics.summarise(
        [metrics.score(HALF > 0, HALF > 0, n_classes=k) for k in (2, 3)]
    ),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REJECTED[message]()


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
def test_rejects_labels(function: Callable[..., object]) -> None:
    name = function.__name__
    with pytest.raises(
        ValueError, match=rf"{name}: predicted and true must .* \[2, 1\] and \[1, 2\]"
    ):
        function([[1], [2]], [[1, 2]])
    with pytest.raises(ValueError, match=f"{name}: true must not be negative, got -1"):
        function([0], [-1])
    with pytest.raises(TypeError, match=f"{name}: predicted must be integers or bool, got float64"):
        function([0.5], [1])


def test_check_can_fail() -> None:
    """The definitions above tell the conventions apart that are easily confused."""
    rng = np.random.default_rng(3)
    predicted, true = rng.integers(0, 4, (2, 8, 8))
    swapped = metrics.variation_of_information(true, predicted)
    assert metrics.variation_of_information(predicted, true) != pytest.approx(swapped)
    assert brute_adapted_rand(predicted + 1, true + 1) != pytest.approx(
        metrics.adapted_rand_error(predicted, true)
    )
