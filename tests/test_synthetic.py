"""Synthetic cells are the same for the same seed, touch, and load as any data does."""

import time
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, mean
from skimage.filters import threshold_otsu
from skimage.measure import label
from skimage.segmentation import find_boundaries

from fastunet.data import load_sections, open_pages
from fastunet.synthetic import cells, write_cells


@pytest.mark.parametrize("size", [(256, 256), (64, 300), (1, 1), (3, 200)])
def test_shapes(size: tuple[int, int]) -> None:
    image, labels = cells(size=size, count=8)
    assert image.shape == labels.shape == size
    assert image.dtype == np.uint8
    assert labels.dtype == np.uint16


def test_cells_are_whole_and_half_of_the_image() -> None:
    for seed in range(5):
        _, labels = cells(seed=seed)
        assert 0.35 < (labels > 0).mean() < 0.65
        areas = np.bincount(labels.ravel())[1:]
        assert len(areas) > 20
        assert areas.min() > 20
        assert areas.max() > 3 * areas.min()
        # one component each
        assert label(labels, connectivity=2, background=0).max() == len(areas)


def test_more_than_a_threshold_is_needed() -> None:
    errors, lines, spreads = [], [], []
    for seed in range(5):
        image, labels = cells(seed=seed)
        foreground = labels > 0
        errors.append(((image > threshold_otsu(image)) != foreground).mean())
        # where only another cell makes a border, and a few pixels beside
        depth = distance_transform_edt(foreground)
        seam = find_boundaries(labels, mode="inner") & (depth > 4)
        away = distance_transform_edt(~seam)
        assert seam.sum() > 100
        lines.append(image[seam].mean() / image[(depth > 4) & (away >= 3) & (away < 5)].mean())
        greys = mean(image, labels, np.unique(labels)[1:])
        spreads.append(np.std(greys) / np.mean(greys))
    assert np.mean(errors) > 0.05
    # the dome alone gives 0.91
    assert 0.7 < np.mean(lines) < 0.86
    # light alone gives 0.15
    assert np.mean(spreads) > 0.19


def test_seed() -> None:
    one, same, other = cells(seed=3), cells(seed=3), cells(seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_write_cells(tmp_path: Path) -> None:
    paths = write_cells(tmp_path / "a", pages=3, size=(64, 80), count=6, seed=1)
    again = write_cells(tmp_path / "b", pages=3, size=(64, 80), count=6, seed=1)
    assert [path.name for path in paths] == ["images.tif", "labels.tif"]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["images.tif", "labels.tif"]
    source = open_pages(paths[0])
    pages = np.stack([source.page(i)[0] for i in range(3)])
    assert source.shape(0) == (1, 64, 80)
    assert not np.array_equal(pages[0], pages[1])
    sections = load_sections(*paths)
    assert [section.cells.max() for section in sections] == [6, 6, 6]


def test_rejects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be at least 1 x 1, got 0 x 5"):
        cells(size=(0, 5))
    for count in (0, 65536):
        with pytest.raises(ValueError, match=f"count must be from 1 to 65535, got {count}"):
            cells(count=count)
    with pytest.raises(ValueError, match="pages must be at least 1, got 0"):
        write_cells(tmp_path / "a", pages=0)
    assert not (tmp_path / "a").exists()


def test_fast() -> None:
    # the least of several, for other work on the machine only adds
    times = []
    for seed in range(10):
        start = time.process_time()
        cells(seed=seed)
        times.append(time.process_time() - start)
    assert min(times) < 0.05
