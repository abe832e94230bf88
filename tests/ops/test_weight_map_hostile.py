"""weight_map and separate_touching on what nobody should give them: an error or a right result."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastunet import separate_touching, weight_map
from fastunet.backends import EXTENSION_MISSING

from .test_weight_map import exact_distances, exact_weights, random_map

MAP, SEPARATE = torch.ops.fastunet.weight_map, torch.ops.fastunet.separate_touching
NUMBERS = (10.0, 5.0, 1.0, 1.0, 1.0)
LABELS = torch.zeros(1, 1, 4, 4, dtype=torch.int32)

needs_extension = pytest.mark.skipif(bool(EXTENSION_MISSING), reason=EXTENSION_MISSING or "never")


@needs_extension
@pytest.mark.parametrize(
    ("message", "labels", "class_weight"),
    [
        (r"labels must be \[B, D, H, W\], got rank 2", LABELS[0, 0], None),
        (r"labels must be \[B, D, H, W\], got rank 0", LABELS[0, 0, 0, 0], None),
        ("labels must be int32 or int64", LABELS.short(), None),
        ("labels must be int32 or int64", LABELS.float(), None),
        ("labels must be at most 16777216 long", LABELS[..., :1].expand(1, 1, 4, 2**24 + 1), None),
        (r"class_weight must be \[2\] float32", LABELS, torch.ones(3)),
        (r"class_weight must be \[2\] float32", LABELS, torch.ones(2, dtype=torch.float64)),
    ],
)
def test_operators_check_what_python_checks(
    message: str, labels: Tensor, class_weight: Tensor | None
) -> None:
    """Who calls the operator and not the function skips Python's checks."""
    with pytest.raises(RuntimeError, match=f"weight_map: {message}"):
        MAP(labels, class_weight, False, *NUMBERS, False)
    if class_weight is None:
        with pytest.raises(RuntimeError, match=f"separate_touching: {message}"):
            SEPARATE(labels, 1)


@needs_extension
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300])
def test_numbers_without_checks(bad: float) -> None:
    """NaN and infinity given to the operator itself end, with some number a pixel."""
    labels = torch.from_numpy(random_map("touching", (1, 1, 30, 40), 5, np.random.default_rng(0)))
    for place in range(len(NUMBERS)):
        numbers = [*NUMBERS[:place], bad, *NUMBERS[place + 1 :]]
        for distances in (False, True):
            assert MAP(labels, None, True, *numbers, distances)[0].shape == labels.shape
    assert torch.equal(SEPARATE(labels, -1), labels)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -5.0, 0.0])
def test_class_weights(value: float) -> None:
    labels = random_map("touching", (30, 40), 5, np.random.default_rng(1))
    weights = weight_map(labels, class_weight=torch.tensor([value, 2.0]))
    border = exact_weights(labels, *exact_distances(labels), False) - 1
    wanted = np.where(labels > 0, 2.0, value) + border
    np.testing.assert_allclose(weights, wanted, rtol=0, atol=15 * 4e-6)


def test_largest_ids() -> None:
    """Ids at the ends of their types, one of each, beside each other."""
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64):
        ends = np.iinfo(dtype)
        labels = np.array([[ends.max, 0, 1, ends.max - 1, ends.min]], dtype)
        plain = np.array([[3, 0, 1, 2, 0]], np.int32)
        assert np.array_equal(weight_map(labels), weight_map(plain))
        wanted = np.where(np.array([[True, True, False, False, True]]), labels, 0)
        assert np.array_equal(separate_touching(labels), wanted)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (0, 0, 0), (2, 0, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    labels: Any = np.zeros(shape, np.int64)
    assert weight_map(labels, separate=3).shape == shape
    assert separate_touching(labels).shape == shape
    if len(shape) == 3:
        assert weight_map(labels, spacing=(1, 1, 1)).shape == shape


def test_more_cells_than_pixels_of_a_row() -> None:
    """Every pixel its own cell: d1 = 0 and d2 = 1 everywhere."""
    labels = torch.arange(1, 301 * 200 + 1).view(301, 200)
    _, d1, d2 = weight_map(labels, return_distances=True)
    assert torch.equal(d1, torch.zeros(301, 200))
    assert torch.equal(d2, torch.ones(301, 200))
    assert not separate_touching(labels).any()


def test_longest_lines() -> None:
    """Two cells at the ends of a line of 2^20 pixels, along either axis."""
    size = 1 << 20
    labels = torch.zeros(1, size, dtype=torch.int32)
    labels[0, 0], labels[0, -1] = 1, 2
    position = torch.arange(size, dtype=torch.float32)
    for turned in (labels, labels.T):
        weights, d1, d2 = weight_map(turned, class_weight=None, return_distances=True)
        assert torch.equal(weights, torch.ones(turned.shape))
        assert torch.equal(d1.flatten(), torch.minimum(position, position.flip(0)))
        assert torch.equal(d2.flatten(), torch.maximum(position, position.flip(0)))


def test_shared_memory_is_not_written() -> None:
    """Labels that overlap themselves are read, and outputs are apart from them."""
    line = torch.arange(10, dtype=torch.int32)
    windows = line.unfold(0, 4, 1)
    assert torch.equal(weight_map(windows), weight_map(windows.clone()))
    separate_touching(windows).fill_(7)
    assert torch.equal(line, torch.arange(10, dtype=torch.int32))
