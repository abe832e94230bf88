"""Overlays pixel by pixel; figures by what can be seen in them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastunet import figures


def scene() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """A ramp of greys, and two squares on it."""
    page = np.tile(np.arange(64, dtype=np.uint8), (48, 1))
    labels = np.zeros((48, 64), np.int32)
    labels[4:20, 4:20], labels[28:44, 30:60] = 1, 2
    return page, labels


def test_overlay() -> None:
    page, labels = scene()
    rgb = figures.overlay(page, labels)
    assert rgb.dtype == np.uint8
    assert rgb.shape == (48, 64, 3)
    # background: the grey alone, stretched over the full range
    assert (rgb[labels == 0].max(axis=1) == rgb[labels == 0].min(axis=1)).all()
    assert rgb[0, 0].tolist() == [0, 0, 0]
    assert rgb[0, -1].tolist() == [255, 255, 255]
    # outline: the class's colour alone; inside: mostly grey
    for k, (row, column) in ((1, (4, 10)), (2, (28, 40))):
        colour = figures.CLASS_COLOURS[k - 1]
        assert np.array_equal(rgb[row, column], colour)
        grey = float(rgb[0, column, 0])
        mixed = grey + figures.TINT * (colour - grey)
        # both the grey and the mixture were rounded
        assert np.abs(rgb[row + 5, column] - mixed).max() <= 1
    # the classes beyond the palette begin it again
    assert np.array_equal(figures.overlay(page, labels + 6 * (labels > 0)), rgb)


def test_overlay_of_other_pages() -> None:
    page, labels = scene()
    expected = figures.overlay(page, labels > 0)
    assert np.array_equal(figures.overlay(np.stack([page] * 3), labels > 0), expected)
    assert np.array_equal(figures.overlay(page * 1e-3 - 7, labels > 0), expected)
    assert (figures.overlay(np.full((5, 5), 9), np.zeros((5, 5), int)) == 128).all()
    assert figures.overlay(np.ones((1, 1, 1)), [[1]]).shape == (1, 1, 3)


def test_png_is_whole_or_not_there(tmp_path: Path) -> None:
    page, labels = scene()
    rgb = figures.overlay(page, labels)
    path = tmp_path / "new" / "a.png"
    figures.write_png(path, rgb)
    assert np.array_equal(np.asarray(Image.open(path)), rgb)
    with pytest.raises(TypeError):
        figures.write_png(path, rgb.astype(np.complex128))
    assert np.array_equal(np.asarray(Image.open(path)), rgb)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_predicted_cells_take_the_ids_of_true_ones() -> None:
    true = np.repeat([[0, 3, 9, 5]], 4, axis=0)
    assert np.array_equal(figures._matched(np.repeat([[0, 7, 1, 2]], 4, axis=0), true), true)
    # of two halves the larger one is the match, the other and a cell on background are new
    halves = np.repeat([[4, 6, 9, 9]], 4, axis=0)
    halves[0, 1] = 8
    renamed = figures._matched(halves, true)
    assert renamed[1:, 1].tolist() == [3] * 3
    assert renamed[0, 2] == renamed[0, 3] in (9, 5)
    assert min(renamed[0, 0], renamed[0, 1]) > 9
    assert renamed[0, 0] != renamed[0, 1]
    empty = np.zeros_like(true)
    assert np.array_equal(figures._matched(empty, true), empty)
    assert figures._matched(true, empty).max() > 0


def test_panel(tmp_path: Path) -> None:
    page, labels = scene()
    weights = 1 + 9 * np.random.default_rng(0).random(page.shape)
    with_scores = {"pixel error": 0.081, "IoU": 0.9}
    figures.panel(tmp_path / "a.png", page, labels, labels, weights, with_scores)
    figures.panel(tmp_path / "b.png", page, labels, labels * 0, weights)
    a, b = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("a.png", "b.png"))
    assert a.shape[1] == b.shape[1] == 2400
    # a cell has one colour in truth and prediction; without a prediction half of its pixels go
    colour = figures._cell_colours(labels)[10, 10]
    counts = [int((picture == colour).all(axis=-1).sum()) for picture in (a, b)]
    assert counts[1] > 1000
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.05)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_curve(tmp_path: Path) -> None:
    training = [{"step": i, "seconds": 0.1 * i, "loss": 1 / i} for i in range(1, 101)]
    validation = [{"step": i, "val_loss": 1 / i, "val_pixel_error": 0.1} for i in (50, 100)]
    sizes = []
    for name, history in (("a", training + validation), ("b", training[:1]), ("c", validation[:1])):
        figures.curve(tmp_path / f"{name}.png", history)
        sizes.append(Image.open(tmp_path / f"{name}.png").size)
    # a second panel where there is something for it
    assert [width for width, _ in sizes] == [1800, 900, 1800]


def test_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, labels = scene()
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"overlay: classes must be \[48, 64\] .*, got \[47, 64\]"):
        figures.overlay(page, labels[1:])
    with pytest.raises(ValueError, match=r"a page must be \[C, H, W\] or \[H, W\], got \[64\]"):
        figures.overlay(page[0], labels)
    with pytest.raises(ValueError, match=r"panel: weights must be \[48, 64\] .*, got \[48\]"):
        figures.panel(path, page, labels, labels, np.ones(48))
    with pytest.raises(ValueError, match=r"history must hold loss or val_loss, got \['step'\]"):
        figures.curve(path, [{"step": 1}])
    with pytest.raises(ValueError, match="history must hold loss or val_loss, got nothing"):
        figures.curve(path, [])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ValueError, match=r"figures need matplotlib: pip install 'fastunet\[plot\]'"
    ):
        figures.curve(path, [{"step": 1, "loss": 1.0}])
    assert not list(tmp_path.iterdir())


def test_figures_leave_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a graphical pyplot would want a display, and keep every figure
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figures.curve(tmp_path / "a.pdf", [{"step": 1, "loss": 1.0}])
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
