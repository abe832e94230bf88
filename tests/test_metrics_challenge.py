"""Scores of the EM and Cell Tracking challenges against their definitions, pixel by pixel."""

import json
from collections import Counter
from fractions import Fraction
from itertools import product
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from fastunet import metrics
from fastunet.metrics import challenge

from .test_metrics import Labels, label_pairs, leaking_cells

PERFECT = metrics.SplitMerge(1, 1, 1)
EIGHT = np.ones((3, 3), bool)


def brute_rand(predicted: Labels, true: Labels) -> tuple[float, float, float]:
    """Ordered pairs of pixels, each also with itself; predicted background joins no other pixel."""
    pixels = [
        (i, p, t) for i, (p, t) in enumerate(zip(predicted.flat, true.flat, strict=True)) if t
    ]
    same_p = same_t = both = 0
    for (i, p, t), (j, q, u) in product(pixels, pixels):
        joined = i == j or (p == q and p != 0)
        same_p += joined
        same_t += int(t == u)
        both += joined and t == u
    if not pixels:
        return 1, 1, 1
    split, merge = Fraction(both, same_t), Fraction(both, same_p)
    return float(2 * split * merge / (split + merge)), float(split), float(merge)


def brute_information(predicted: Labels, true: Labels) -> tuple[float, float, float]:
    pixels = [
        (p or -i, t) for i, (p, t) in enumerate(zip(predicted.flat, true.flat, strict=True), 1) if t
    ]

    def bits(symbols: list[Any]) -> float:
        return -sum(n / len(symbols) * log2(n / len(symbols)) for n in Counter(symbols).values())

    h_s, h_t = bits([p for p, _ in pixels]), bits([t for _, t in pixels])
    shared = h_s + h_t - bits(pixels)
    return (
        2 * shared / (h_s + h_t) if h_s + h_t else 1.0,
        shared / h_s if h_s else 1.0,
        shared / h_t if h_t else 1.0,
    )


def brute_accuracy(predicted: Labels, true: Labels) -> float:
    ids = sorted(set(true.flat) - {0})
    total = Fraction(0)
    for t in ids:
        reference = {i for i, value in enumerate(true.flat) if value == t}
        for p in set(predicted.flat) - {0}:
            found = {i for i, value in enumerate(predicted.flat) if value == p}
            if 2 * len(found & reference) > len(reference):
                total += Fraction(len(found & reference), len(found | reference))
    return float(total / len(ids)) if ids else 1.0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(label_pairs())
def test_against_brute_force(pair: tuple[Labels, Labels]) -> None:
    assert metrics.rand_score(*pair) == pytest.approx(brute_rand(*pair), abs=1e-12)
    assert metrics.information_score(*pair) == pytest.approx(brute_information(*pair), abs=1e-9)
    assert metrics.segmentation_accuracy(*pair) == pytest.approx(brute_accuracy(*pair), abs=1e-12)


def test_one_merge_and_one_split() -> None:
    one, two = np.ones((4, 6), int), np.repeat([[1] * 3 + [2] * 3], 4, axis=0)
    half = pytest.approx((2 / 3, 1, 0.5))
    assert metrics.rand_score(one, two) == half
    assert metrics.information_score(one, two) == (0, 1, 0)
    score, split, merge = metrics.rand_score(two, one)
    assert (score, merge, split) == half
    assert metrics.information_score(two, one) == (0, 0, 1)
    # of three equal cells two are merged: I = H(S) = log2(3) - 2/3 bits
    three, merged = np.array([[1, 2, 3]]), np.array([[1, 1, 3]])
    assert metrics.rand_score(merged, three) == pytest.approx((3 / 4, 1, 3 / 5))
    known = (log2(3) - 2 / 3) / log2(3)
    assert metrics.information_score(merged, three) == pytest.approx(
        (2 * known / (1 + known), 1, known)
    )
    assert metrics.segmentation_accuracy(merged, three) == pytest.approx((0.5 + 0.5 + 1) / 3)
    # exactly half of a cell is not more than half
    assert metrics.segmentation_accuracy(two, one) == 0


def test_names_do_not_matter_and_nothing_is_perfect() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 8, 8))
    names = np.array([0, 91, 17, 2**63 - 1, 3])
    nothing = np.zeros((4, 4), int)
    for score in (metrics.rand_score, metrics.information_score, metrics.segmentation_accuracy):
        expected: Any = score(a, b)
        assert score(names[a], names[b]) == pytest.approx(expected, rel=1e-12)
        perfect: Any = score(b, b)
        assert perfect == pytest.approx(1 if isinstance(perfect, float) else PERFECT)
        empty: Any = score(np.eye(4, dtype=int), nothing)
        assert empty == (1 if isinstance(empty, float) else PERFECT)
    assert metrics.rand_score(nothing, np.ones((4, 4), int)) == pytest.approx((2 / 17, 1 / 16, 1))


@pytest.mark.parametrize("seed", range(5))
def test_thinning(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = ndimage.gaussian_filter(rng.random((50, 70)), 2)
    segments = ndimage.label(p > np.quantile(p, 0.8))[0]
    assert segments.max() > 5
    # other ids, in no order
    names = np.append(0, rng.permutation(np.arange(1, segments.max() + 1)) * 1000)
    thin = metrics.thin_borders(names[segments])
    ids = np.append(0, np.unique(names)[1:])[thin]
    assert np.array_equal(ids[segments > 0], names[segments][segments > 0])
    for k in range(1, int(thin.max()) + 1):
        # where lines meet they may cut off a few pixels
        parts = np.bincount(ndimage.label(thin == k)[0].ravel())[1:]
        assert parts.sum() - parts.max() <= 3
    # no pixel of one segment is beside one of another, and lines are thin: each pixel touches a
    # segment, and nearly all touch two of them
    for axis in (0, 1):
        first, second = np.moveaxis(thin, axis, 0)[:-1], np.moveaxis(thin, axis, 0)[1:]
        assert not ((first != second) & (first > 0) & (second > 0)).any()
    around = np.pad(thin, 1)
    near = np.stack([around[1 + i : 51 + i, 1 + j : 71 + j] for i, j in challenge.AROUND])
    many = np.array(
        [len(set(near[:, i, j]) - {0}) for i, j in zip(*np.nonzero(thin == 0), strict=True)]
    )
    assert many.min() >= 1
    assert (many >= 2).mean() > 0.95
    # at one speed: what is nearer to a segment by far than to any other is its own
    distance = np.stack(
        [
            ndimage.distance_transform_cdt(segments != k, "taxicab")
            for k in range(1, segments.max() + 1)
        ]
    )
    ordered = np.sort(distance, axis=0)
    clear = ordered[1] - ordered[0] > 6
    assert clear.sum() > 500
    assert (ids == names[1 + distance.argmin(0)])[clear].mean() > 0.98


def test_thinning_of_one_segment_and_none() -> None:
    page = np.zeros((5, 5), np.uint8)
    assert not metrics.thin_borders(page).any()
    page[2, 3] = 7
    assert (metrics.thin_borders(page) == 1).all()


def thick(p: NDArray[np.float32], pixels: int) -> NDArray[np.float32]:
    """Cells with membranes that are wider by so many pixels on each side."""
    return np.asarray(ndimage.grey_erosion(p, 2 * pixels + 1))


def test_the_width_of_membranes_does_not_matter_after_thinning() -> None:
    p, true = leaking_cells()
    p[10:13, 29:31] = 0.1
    found = metrics.instances(thick(p, 3))
    assert metrics.rand_score(found, true).score < 0.9
    assert metrics.rand_score(metrics.thin_borders(found), true) == PERFECT
    scores = metrics.score(thick(p, 3), true > 0, true, challenge=True)
    assert scores.v_rand == scores.v_info == PERFECT
    assert scores.challenge is not None
    assert scores.challenge.v_rand["0.5"] == PERFECT
    assert scores.challenge.warping_error == 0 < scores.pixel_error


def test_the_best_threshold_of_all_pages() -> None:
    p, true = leaking_cells()
    scores = [metrics.score(page, true > 0, true, challenge=True) for page in (p, p * 0.7)]
    curves = [page.challenge.v_rand for page in scores if page.challenge]
    # the gap closes at 0.7, in the second page at 0.49
    assert [metrics.maximal(curve) for curve in curves] == [("0.7", PERFECT), ("0.5", PERFECT)]
    assert curves[0]["0.6"].merge < curves[0]["0.6"].split == 1
    mean = metrics.summarise(scores)
    assert mean.challenge is not None
    best, score = metrics.maximal(mean.challenge.v_rand)
    assert best == "0.5"
    assert score.score == pytest.approx((curves[0]["0.5"].score + 1) / 2)
    assert score.score < 1
    assert list(mean.challenge.v_rand) == [f"{i / 10:.1f}" for i in range(11)]
    # all membrane: no pixel is joined to another
    assert mean.challenge.v_rand["1.0"].merge == 1
    written = json.loads(json.dumps(mean.to_dict(), allow_nan=False))
    assert written["challenge"]["maximal_v_rand"] == {"threshold": 0.5, **score._asdict()}
    assert written["v_rand"].keys() == {"score", "split", "merge"}
    assert metrics.score(p, true > 0, true).to_dict()["challenge"] is None


def test_accuracy_is_averaged_over_cells() -> None:
    one = metrics.score(np.eye(3) > 2, np.array([[1, 0, 0], [0, 0, 0], [0, 0, 0]]))
    four = metrics.score(np.eye(4) > 0, np.eye(4) > 0)
    none = metrics.score(np.zeros((2, 2), int), np.zeros((2, 2), int))
    assert (one.segmentation_accuracy, four.segmentation_accuracy) == (0, 1)
    assert metrics.summarise([one, four, none]).segmentation_accuracy == pytest.approx(4 / 5)
    assert metrics.summarise([none]).segmentation_accuracy == 1


def topology(inside: NDArray[np.bool_]) -> tuple[int, int]:
    """Cells (4-connected) and pieces of background (8-connected), background all around."""
    padded = np.pad(inside, 1)
    return ndimage.label(padded)[1], ndimage.label(~padded, EIGHT)[1]


def test_simple_points() -> None:
    """A pixel is simple if flipping it keeps the numbers of cells and of pieces of background."""
    for pattern, simple in enumerate(challenge._simple_points()):
        page = np.zeros((3, 3), bool)
        for bit, (i, j) in enumerate(challenge.AROUND):
            page[1 + i, 1 + j] = pattern >> (7 - bit) & 1
        # what joins far away tells nothing of the pixel: here nothing does
        flipped = page.copy()
        flipped[1, 1] = True
        assert simple == (topology(page) == topology(flipped)), page


def brute_warping(p: NDArray[np.float32], true: NDArray[np.bool_], threshold: float) -> int:
    bent, target = true.copy(), p > threshold
    wrong = sorted(
        zip(*np.nonzero(bent != target), strict=True),
        key=lambda at: -abs(p[at] - np.float32(threshold)),
    )
    flipped = True
    while flipped:
        flipped = False
        for at in wrong:
            if bent[at] == target[at]:
                continue
            before = topology(bent)
            bent[at] ^= True
            if topology(bent) == before:
                flipped = True
            else:
                bent[at] ^= True
    assert topology(bent) == topology(true)
    return int((bent != target).sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 1.0]), st.sampled_from([0.3, 0.5]))
def test_warping_against_brute_force(seed: int, sigma: float, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.random((2, 9, 11)), (0, sigma, sigma))
    p, true = noise[0].astype(np.float32), noise[1] > 0.5
    error = metrics.warping_error(p, true, threshold=threshold)
    assert error == pytest.approx(brute_warping(p, true, threshold) / 99)


def test_what_warping_forgives() -> None:
    true = np.ones((20, 30), bool)
    true[:, 14:16] = False
    moved, far = (np.roll(true, pixels, axis=1).astype(np.float32) for pixels in (2, 5))
    assert metrics.pixel_error(moved > 0, true) > 0.1
    assert metrics.warping_error(moved, true) == 0
    # a border that is away from the true one is another
    assert metrics.warping_error(far, true) * 600 >= 20
    # a membrane one pixel thick across the gap, a bridge as thin across the wall, and the speck
    gap, wall, speck = true.copy(), true.copy(), true.copy()
    gap[7:10, 14:16], wall[9:12, :14], speck[5, 5] = True, False, False
    for page, pixels in ((gap, 3), (wall, 3), (speck, 1)):
        assert metrics.warping_error(page.astype(np.float32), true) * 600 == pytest.approx(pixels)
    assert metrics.warping_error(np.zeros((0, 3), np.float32), np.zeros((0, 3), int)) == 0


def test_real_sections(em_folder: Path) -> None:
    inside = tifffile.imread(em_folder / "train-labels.tif", key=24) > 0
    cells = ndimage.label(inside)[0]
    assert metrics.rand_score(metrics.thin_borders(cells), cells) == PERFECT
    assert metrics.information_score(cells, cells) == pytest.approx(PERFECT)
    eroded = ndimage.binary_erosion(inside, iterations=2)
    thinned = metrics.score(eroded.astype(np.float32), inside, cells, challenge=True)
    assert thinned.challenge is not None
    raw = metrics.rand_score(metrics.instances(eroded.astype(np.float32)), cells)
    assert raw.score + 0.05 < thinned.v_rand.score > 0.95
    assert thinned.challenge.warping_error < 0.01 < 0.1 < thinned.pixel_error
    # membranes with gaps merge cells and split none
    leaky = metrics.score(ndimage.binary_dilation(inside, iterations=2).astype(np.uint8), inside)
    assert leaky.v_rand.merge < 0.7 < 0.95 < leaky.v_rand.split
    assert leaky.v_info.merge < leaky.v_info.split


def test_rejects() -> None:
    p = np.full((4, 4), 0.5, np.float32)
    with pytest.raises(ValueError, match=r"thin_borders: instances must be \[H, W\], got \[4\]"):
        metrics.thin_borders(np.zeros(4, int))
    with pytest.raises(ValueError, match="thin_borders: instances must not be negative, got -1"):
        metrics.thin_borders([[-1]])
    with pytest.raises(ValueError, match=r"warping_error: .* one shape .* \[4, 4\] and \[4\]"):
        metrics.warping_error(p, np.zeros(4, int))
    with pytest.raises(
        ValueError, match=r"warping_error: probability must be in \[0, 1\], got nan"
    ):
        metrics.warping_error(p * np.nan, p > 0)
    with pytest.raises(TypeError, match="threshold_curves: probability must be floating point"):
        metrics.threshold_curves(p > 0, p > 0)
    for score in (metrics.rand_score, metrics.information_score, metrics.segmentation_accuracy):
        name = score.__name__
        with pytest.raises(ValueError, match=rf"{name}: predicted and true .* \[1\] and \[2\]"):
            score([1], [1, 2])
        with pytest.raises(TypeError, match=f"{name}: true must be integers or bool"):
            score([1], [1.5])


def test_check_can_fail() -> None:
    """The definitions tell apart what is easily confused."""
    rng = np.random.default_rng(3)
    predicted, true = rng.integers(0, 4, (2, 8, 8))
    for score in (metrics.rand_score, metrics.information_score):
        _, split, merge = score(predicted, true)
        assert split != pytest.approx(merge, abs=1e-3)
        # predicted background as one more segment, true background as one more cell
        assert score(predicted + 1, true) != pytest.approx(score(predicted, true), abs=1e-3)
        assert score(predicted, true + 1) != pytest.approx(score(predicted, true), abs=1e-3)
