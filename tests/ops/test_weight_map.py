"""weight_map against one distance transform a cell, by scipy and in float64."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

import fastunet
from fastunet import separate_touching, weight_map
from fastunet.backends import EXTENSION_MISSING
from fastunet.ops.weight_map import reference
from fastunet.ops.weight_map.reference import weight_map_reference

Array = np.ndarray[Any, Any]
OPERATOR = torch.ops.fastunet.weight_map
# whoever serves the device, and the fallback of all devices
SERVERS: dict[str, Callable[..., Any]] = {"registered": OPERATOR, "reference": weight_map_reference}
KINDS = ("blobs", "touching", "noise", "disconnected", "stripes")
W0, SIGMA = 10.0, 5.0


def random_map(kind: str, shape: tuple[int, ...], cells: int, rng: np.random.Generator) -> Array:
    """int32 labels; ids are neither consecutive nor in order."""
    if cells == 0:
        return np.zeros(shape, np.int32)
    grid = np.moveaxis(np.indices(shape), 0, -1).astype(float)
    ids = np.append(0, rng.choice(100_000, cells, replace=False) + 1).astype(np.int32)
    if kind == "noise":
        return ids[rng.integers(1, cells + 1, shape) * (rng.random(shape) < 0.7)]
    if kind == "stripes":
        edges = np.sort(rng.uniform(0, sum(shape), 2 * cells))
        interval = np.searchsorted(edges, grid @ rng.uniform(0, 1, len(shape)))
        return ids[np.where(interval % 2, interval // 2 + 1, 0)]
    discs = cells * (4 if kind == "disconnected" else 1)
    numbers = np.zeros(shape, int)
    nearest = np.full(shape, np.inf)
    radius = (math.prod(shape) / discs) ** (1 / len(shape)) / 2
    for disc in range(discs):
        centre = rng.uniform(0, shape)
        square = ((grid - centre) ** 2).sum(-1)
        inside = square < (radius * rng.uniform(0.3, 1.0)) ** 2
        if kind == "touching":
            inside = square < nearest
            nearest = np.minimum(nearest, square)
        numbers[inside] = disc % cells + 1
    return ids[numbers]


def exact_distances(labels: Array, spacing: Any = 1.0) -> tuple[Array, Array]:
    """d1 and d2 by one distance transform a cell, the two smallest kept."""
    d1, d2 = np.full((2, *labels.shape), np.inf)
    for ident in np.unique(labels[labels > 0]):
        distance = ndimage.distance_transform_edt(labels != ident, sampling=spacing)
        d2 = np.minimum(d2, np.maximum(d1, distance))
        d1 = np.minimum(d1, distance)
    return d1, d2


def exact_weights(labels: Array, d1: Array, d2: Array, balanced: bool) -> Array:
    is_cell = labels > 0
    share = np.where(is_cell, is_cell.mean(), 1 - is_cell.mean())
    of_class = 0.5 / share if balanced and 0 < is_cell.mean() < 1 else 1.0
    return of_class + W0 * np.exp(-((d1 + d2) ** 2) / (2 * SIGMA**2))


def volumes(labels: Array) -> Tensor:
    """[B, D, H, W] of one image or volume."""
    return torch.from_numpy(labels).reshape((1,) * (4 - labels.ndim) + labels.shape)


def check(labels: Array, serve: Callable[..., Any]) -> None:
    """Squared distances are the same integers, weights within 4e-6."""
    exact = exact_distances(labels)
    arguments = (volumes(labels), None, True, W0, SIGMA, 1.0, 1.0, 1.0)
    _, *squares = (t.view(labels.shape).double().square() for t in serve(*arguments, True))
    for square, distance in zip(squares, exact, strict=True):
        np.testing.assert_array_equal(square.round().numpy(), np.rint(distance**2))
    for balanced in (True, False):
        arguments = (volumes(labels), None, balanced, W0, SIGMA, 1.0, 1.0, 1.0)
        weights = serve(*arguments, False)[0].view(labels.shape)
        wanted = exact_weights(labels, *exact, balanced)
        assert np.max(np.abs(weights.numpy() - wanted) / wanted) <= 4e-6


def maps_of(kind: str, count: int) -> Iterator[Array]:
    """Every fifth is a volume."""
    rng = np.random.default_rng(KINDS.index(kind))
    for number in range(count):
        volume = number % 5 == 4
        shape = tuple(rng.integers(1, 13 if volume else 49, 3 if volume else 2))
        yield random_map(kind, shape, int(rng.integers(0, 12)), rng)


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind: str) -> None:
    for labels in maps_of(kind, 100):
        for serve in SERVERS.values():
            check(labels, serve)


@pytest.mark.parametrize(
    ("kind", "shape", "cells"),
    [
        ("blobs", (512, 512), 60),
        ("touching", (500, 333), 120),
        ("disconnected", (129, 512), 10),
        ("noise", (200, 120), 300),
        ("blobs", (1, 512), 5),
        ("touching", (16, 70, 45), 20),
    ],
)
def test_forward_large(kind: str, shape: tuple[int, ...], cells: int) -> None:
    labels = random_map(kind, shape, cells, np.random.default_rng(5))
    check(labels, OPERATOR)


def test_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that remembers one cell only is wrong, and the check sees it in every kind of map."""

    def one_candidate(labels: Tensor, axis: int, spacing: float) -> reference.Triple:
        ident, first, second = scan_lines(labels, axis, spacing)
        return ident, first, torch.full_like(second, math.inf)

    scan_lines = reference.scan_lines
    monkeypatch.setattr(reference, "scan_lines", one_candidate)
    for kind in KINDS:
        labels = random_map(kind, (40, 50), 8, np.random.default_rng(1))
        with pytest.raises(AssertionError):
            check(labels, weight_map_reference)


@pytest.mark.parametrize("serve", SERVERS)
def test_spacing(serve: str) -> None:
    # the spacing, the product, the square, two sums and the root each round once
    rounding = 3 * torch.finfo(torch.float32).eps
    rng = np.random.default_rng(7)
    for axes in (2, 3) * 15:
        labels = random_map("touching", tuple(rng.integers(1, 20, axes)), 6, rng)
        spacing = rng.uniform(0.2, 4.0, axes).tolist()
        padded = [1.0] * (3 - axes) + spacing
        _, *distances = SERVERS[serve](volumes(labels), None, False, W0, SIGMA, *padded, True)
        for actual, exact in zip(distances, exact_distances(labels, spacing), strict=True):
            np.testing.assert_allclose(actual.view(labels.shape), exact, rtol=rounding)


@pytest.mark.parametrize("serve", SERVERS)
@pytest.mark.parametrize("given", [None, (0.0, 0.0), (1e-6, 50.0), (-1.0, 3.0)])
def test_reach_changes_no_bit(serve: str, given: tuple[float, float] | None) -> None:
    """The search stops where the border term is too small to be seen, and no sooner."""
    rng = np.random.default_rng(8)
    class_weight = None if given is None else torch.tensor(given)
    for sigma in (0.4, 3.0, 11.0):
        for shape in ((70, 90), (9, 30, 40)):
            labels = volumes(random_map("blobs", shape, 12, rng))
            arguments = (labels, class_weight, given is None, W0, sigma, 1.0, 0.7, 1.3)
            near, far = (SERVERS[serve](*arguments, distances)[0] for distances in (False, True))
            assert torch.equal(near, far)


@pytest.mark.skipif(bool(EXTENSION_MISSING), reason=EXTENSION_MISSING or "never")
def test_servers_agree() -> None:
    """Squared distances to the bit: roots are taken in float64, torch's float32 ones may be off."""
    rng = np.random.default_rng(9)
    for kind in KINDS:
        for shape in ((50, 80), (10, 20, 35)):
            labels = volumes(random_map(kind, shape, 9, rng))
            ours = OPERATOR(labels, None, True, W0, SIGMA, 2.3, 0.7, 1.3, True)[1:]
            plain = reference.two_nearest(labels, (2.3, 0.7, 1.3), math.inf)
            for distance, square in zip(ours, plain, strict=True):
                assert torch.equal(distance, square.double().sqrt().float())


def test_class_weight() -> None:
    labels = torch.zeros(2, 6, 8, dtype=torch.int64)
    labels[0, :2, :3] = 4
    is_cell = labels > 0
    plain = weight_map(labels, class_weight=None)
    assert torch.equal(plain, torch.ones(2, 6, 8))
    balanced = weight_map(labels)
    assert balanced[is_cell].sum().item() == pytest.approx(balanced[~is_cell].sum().item())
    assert balanced.mean().item() == pytest.approx(1)
    given = weight_map(labels, class_weight=torch.tensor([0.5, 4.0], dtype=torch.float64))
    assert torch.equal(given, torch.where(is_cell, 4.0, 0.5))


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (1, 1), (0, 4, 4), (3, 0, 4), (4, 0)])
@pytest.mark.parametrize("ident", [0, 3, -2])
def test_fewer_than_two_cells(shape: tuple[int, ...], ident: int) -> None:
    labels = torch.full(shape, ident, dtype=torch.int16)
    weights, d1, d2 = weight_map(labels, return_distances=True)
    assert torch.equal(weights, torch.ones(shape))
    assert torch.equal(d1, torch.full(shape, 0.0 if ident > 0 else math.inf))
    assert torch.equal(d2, torch.full(shape, math.inf))
    assert torch.equal(weight_map(labels), weights)


def test_images_of_a_batch_are_apart(device: torch.device) -> None:
    rng = np.random.default_rng(10)
    images = [random_map(kind, (40, 60), 9, rng) for kind in KINDS]
    batch = torch.from_numpy(np.stack(images)).to(device)
    each = torch.stack([weight_map(image, class_weight=None) for image in batch])
    assert torch.equal(weight_map(batch, class_weight=None), each)
    # with three spacings the same labels are a volume
    volume = weight_map(batch, class_weight=None, spacing=(1, 1, 1))
    assert not torch.equal(volume, each)
    assert torch.equal(weight_map(batch[None], class_weight=None, spacing=(1, 1, 1))[0], volume)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.uint32, np.int64])
def test_integer_types(dtype: type) -> None:
    labels = random_map("touching", (30, 40), 20, np.random.default_rng(11)) % 100
    wanted = weight_map(torch.from_numpy(labels))
    ours = weight_map(labels.astype(dtype))
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == np.float32
    assert torch.equal(torch.from_numpy(ours), wanted)
    assert torch.equal(weight_map(torch.from_numpy(labels.astype(dtype))), wanted)


def test_large_and_negative_ids() -> None:
    labels = random_map("touching", (30, 40), 20, np.random.default_rng(12)).astype(np.int64)
    labels[labels % 3 == 0] = 0
    wanted = weight_map(labels)
    # the lower halves of these ids are all the same
    assert np.array_equal(weight_map(labels << 32), wanted)
    assert np.array_equal(weight_map(np.where(labels > 0, labels, -7)), wanted)
    no_label = np.uint64(2**64 - 1)
    unsigned = np.where(labels > 0, labels.astype(np.uint64), no_label)
    assert np.array_equal(weight_map(unsigned), wanted)


def test_strides(device: torch.device) -> None:
    labels = torch.from_numpy(random_map("blobs", (60, 80), 9, np.random.default_rng(13)))
    labels = labels.to(device)
    for view in (labels.T, labels[3:50:2, 5::3], labels[:1].expand(2, 60, 80)[:, ::7]):
        assert torch.equal(weight_map(view), weight_map(view.contiguous()))
    array = labels.cpu().numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    for same in (array[::-1, ::-1][::-1, ::-1], frozen, array.astype(">i4"), array.copy("F")):
        assert np.array_equal(weight_map(same), weight_map(array))
    assert np.array_equal(weight_map(array[::-1])[::-1], weight_map(array))


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    rng = np.random.default_rng(14)
    maps = [random_map("blobs", (300, 400), 40, rng), random_map("touching", (20, 60, 70), 9, rng)]
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        arguments = (None, True, W0, SIGMA, 1.0, 1.0, 1.0, True)
        results.append([OPERATOR(volumes(labels), *arguments) for labels in maps])
    torch.set_num_threads(before)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert all(map(torch.equal, ours, first))


def test_separate() -> None:
    labels = random_map("touching", (40, 50), 8, np.random.default_rng(15))
    carved = separate_touching(labels, 2)
    assert np.array_equal(weight_map(labels, separate=2), weight_map(carved))
    assert not np.array_equal(weight_map(labels), weight_map(carved))


@pytest.mark.parametrize("distances", [False, True])
@pytest.mark.parametrize("given", [None, torch.tensor([0.5, 2.0])])
def test_registration(distances: bool, given: Tensor | None, device: torch.device) -> None:
    labels = torch.randint(0, 4, (2, 1, 9, 11), dtype=torch.int32, device=device)
    class_weight = None if given is None else given.to(device)
    arguments = (labels, class_weight, given is None, W0, SIGMA, 1.0, 1.0, 2.0, distances)
    torch.library.opcheck(OPERATOR, arguments)

    def call(labels: Tensor) -> Any:
        chosen = "balanced" if class_weight is None else class_weight
        return weight_map(labels, class_weight=chosen, spacing=(1, 2), return_distances=distances)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(labels[:, 0]), call(labels[:, 0]), rtol=0, atol=0)


LABELS = torch.zeros(4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "labels must be of integer ids, got .* float32", {"labels": torch.ones(4, 4)}),
        (TypeError, "labels must be of integer ids, got float64", {"labels": np.ones((4, 4))}),
        (TypeError, "labels must be of integer ids", {"labels": LABELS > 0}),
        (TypeError, "labels must be a torch.Tensor or numpy.ndarray", {"labels": [[1, 2]]}),
        (ValueError, r"labels must be \[H, W\] or \[B, H, W\]", {"labels": LABELS[0]}),
        (ValueError, "spacing of 3 axes", {"spacing": (1, 1, 1)}),
        (ValueError, "labels must be at most", {"labels": LABELS[:1, :1].expand(1, 2**24 + 1)}),
        (ValueError, "spacing must be a number, or one an axis", {"spacing": (1,)}),
        (ValueError, "spacing must be from", {"spacing": math.nan}),
        (ValueError, "spacing must be from", {"spacing": (1, -1)}),
        (TypeError, "spacing must be a number", {"spacing": "ab"}),
        (ValueError, "sigma must be from", {"sigma": 0}),
        (ValueError, "sigma must be from", {"sigma": math.inf}),
        (TypeError, "sigma must be a number", {"sigma": None}),
        (ValueError, "w0 must be from", {"w0": -1}),
        (ValueError, "w0 must be from", {"w0": 10**400}),
        (ValueError, "class_weight must be", {"class_weight": "equal"}),
        (ValueError, "class_weight must be .*2", {"class_weight": torch.ones(3)}),
        (ValueError, "separate must be >= 0", {"separate": -1}),
        (TypeError, "separate must be an int", {"separate": 1.5}),
    ],
)
def test_rejects(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"weight_map: .*{message}"):
        fastunet.weight_map(**{"labels": LABELS, **arguments})


@pytest.mark.parametrize("serve", SERVERS)
@pytest.mark.parametrize("w0", [0.0, 1e-30, torch.finfo(torch.float32).max])
def test_extreme_arguments(serve: str, w0: float) -> None:
    """The ends of what is accepted give numbers, and as large ones as they should."""
    labels = volumes(random_map("touching", (30, 40), 5, np.random.default_rng(16)))
    for sigma, spacing, largest in ((1e-9, 1e9, 1.0), (1e9, 1e-9, max(w0, 1.0))):
        arguments = (labels, None, False, w0, sigma, 1.0, spacing, spacing, False)
        weights = SERVERS[serve](*arguments)[0]
        assert weights.isfinite().all()
        assert weights.max() == largest
