"""Pictures of segmentations: an overlay as pixels, and figures drawn by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from skimage.color import hsv2rgb
from skimage.segmentation import find_boundaries

from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RGB = NDArray[np.uint8]

# told apart with any colour vision (Okabe and Ito); class 1 comes first
CLASS_COLOURS = np.array(
    [
        (255, 160, 0),
        (0, 170, 255),
        (0, 158, 115),
        (213, 94, 0),
        (204, 121, 167),
        (240, 228, 66),
    ],
    np.float32,
)
TINT = 0.12


def overlay(page: ArrayLike, classes: ArrayLike) -> RGB:
    """Draw a segmentation on its image: each class tinted and outlined.

    Args:
        page: [C, H, W] or [H, W], any numbers; shown grey, the mean of its channels.
        classes: [H, W] integer or bool classes, or instance ids; 0 is left as it is.
    Returns: [H, W, 3] uint8.
    Raises: ValueError if the shapes do not fit together.
    """
    grey, labels = _grey(page), np.asarray(classes)
    if labels.shape != grey.shape:
        raise ValueError(
            f"overlay: classes must be {list(grey.shape)} as the page is, got {list(labels.shape)}"
        )
    labels = labels.astype(np.int64)
    strength = TINT * (labels > 0) + (1 - TINT) * find_boundaries(labels, mode="inner")
    colours = CLASS_COLOURS[(labels - 1) % len(CLASS_COLOURS)]
    mixed = grey[..., None] * (1 - strength[..., None]) + colours * strength[..., None]
    return mixed.round().astype(np.uint8)


def heat(values: ArrayLike) -> RGB:
    """Numbers as grey values, from black for the least to white for the greatest.

    Args:
        values: [H, W], finite.
    Returns: [H, W] uint8; all black where all are equal.
    """
    array = np.asarray(values, np.float64)
    low, high = array.min(), array.max()
    return np.round((array - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)


def write_png(path: str | Path, rgb: RGB) -> None:
    """Write a PNG file whole or not at all.

    Args:
        path: the file.
        rgb: [H, W, 3] or, for grey, [H, W] uint8.
    Raises: OSError if the disk refuses.
    """
    with replacing(Path(path)) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG")


def panel(
    path: str | Path,
    image: ArrayLike,
    truth: ArrayLike,
    prediction: ArrayLike,
    weights: ArrayLike,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Draw image, true cells, predicted cells and weight map side by side.

    A predicted cell has the colour of the true cell that it is the best match of.

    Args:
        path: the picture, in a format that its suffix names (.png, .pdf, .svg).
        image: [C, H, W] or [H, W].
        truth: [H, W] integer instance ids, 0 for background.
        prediction: likewise.
        weights: [H, W] loss weights.
        scores: numbers to write under the prediction, by name.
    Raises: ValueError if the sizes differ or matplotlib is missing, with how to install it.
    """
    grey, true_cells, cells = _grey(image), np.asarray(truth), np.asarray(prediction)
    weight = np.asarray(weights)
    for name, array in (("truth", true_cells), ("prediction", cells), ("weights", weight)):
        if array.shape != grey.shape:
            raise ValueError(
                f"panel: {name} must be {list(grey.shape)} as the image is, got {list(array.shape)}"
            )
    height, width = grey.shape
    figure = _figure(16, 16 / 4 * height / width * 0.95 + 0.75)
    axes = figure.subplots(1, 4)
    shown = (
        (f"Image, {width} × {height} pixels", grey),
        (f"Truth, {_count(true_cells)} cells", _cell_colours(true_cells)),
        (f"Prediction, {_count(cells)} cells", _cell_colours(_matched(cells, true_cells))),
        ("Loss weight of each pixel", weight),
    )
    for ax, (title, pixels) in zip(axes, shown, strict=True):
        # grey needs its limits; matplotlib would stretch a constant page to black
        limits = {"cmap": "gray", "vmin": 0, "vmax": 255} if pixels is grey else {"cmap": "inferno"}
        drawn = ax.imshow(pixels, interpolation="none", **limits)
        ax.set_title(title, fontsize=12)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes[-1], fraction=0.046, pad=0.02).outline.set_visible(False)
    if scores:
        text = ",  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        axes[2].set_xlabel(text, fontsize=9, wrap=True)
    _save(figure, path)


def curve(path: str | Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw how training went.

    Args:
        path: the picture, in a format that its suffix names (.png, .pdf, .svg).
        history: one mapping a report with "step" and some of "loss", "val_loss" and other "val_"
            numbers, as the training log holds them.
    Raises: ValueError if there is nothing to draw or matplotlib is missing, with how to install it.
    """
    names = list(dict.fromkeys(name for line in history for name in line))
    others = [name for name in names if name.startswith("val_") and name != "val_loss"]
    losses: list[str] = [name for name in ("loss", "val_loss") if name in names]
    if not losses:
        raise ValueError(f"curve: history must hold loss or val_loss, got {names or 'nothing'}")
    figure = _figure(6 * (1 + bool(others)), 3.8)
    axes = figure.subplots(1, 1 + bool(others), squeeze=False)[0]
    for name in losses:
        steps, values = _series(history, name)
        if name == "loss":
            axes[0].plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
            steps, values = _smooth(steps, values)
            axes[0].plot(steps, values, color="C0", label="training, running mean")
        else:
            axes[0].plot(steps, values, "o-", color="C1", markersize=4, label="validation")
            best = int(np.argmin(values))
            label = f"best, {values[best]:.4f} at step {int(steps[best])}"
            axes[0].plot(steps[best], values[best], "*", color="C3", markersize=13, label=label)
    axes[0].set(title="Loss", yscale="log")
    low, high = axes[0].get_ylim()
    axes[0].yaxis.set_major_formatter("{x:g}")
    # over more than a decade the powers of ten are marks enough
    axes[0].yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")
    for name in others:
        steps, values = _series(history, name)
        label = name.removeprefix("val_").replace("_", " ")
        axes[-1].plot(steps, values, "o-", markersize=4, label=f"{label}, last {values[-1]:.4f}")
        axes[-1].set(title="Validation", ylim=(0, None))
    for ax in axes:
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    _save(figure, path)


def _grey(page: ArrayLike) -> NDArray[np.float32]:
    """[H, W] from 0 to 255, stretched between the 0.5th and 99.5th percentile."""
    array = np.asarray(page, dtype=np.float32)
    if array.ndim not in (2, 3):
        raise ValueError(f"figures: a page must be [C, H, W] or [H, W], got {list(array.shape)}")
    grey = array if array.ndim == 2 else array.mean(axis=0)
    low, high = np.percentile(grey, (0.5, 99.5))
    if low == high:
        return np.full_like(grey, 128)
    return np.clip((grey - low) * (255 / (high - low)), 0, 255)


def _count(cells: NDArray[np.integer[Any]]) -> int:
    return int(np.count_nonzero(np.unique(cells)))


def _cell_colours(cells: NDArray[np.integer[Any]]) -> RGB:
    """A colour for each cell, unlike those of the ids next to it; nearly black between them."""
    ids, index = np.unique(cells, return_inverse=True)
    # steps of the golden ratio spread hues evenly however many there are
    hue = ids * 0.618034 % 1
    saturation, value = 0.35 + 0.3 * (ids * 0.754878 % 1), 0.7 + 0.28 * (ids * 0.569840 % 1)
    table = hsv2rgb(np.stack([hue, saturation, value], axis=-1))
    table[ids == 0] = 0.08
    return (255 * table).round().astype(np.uint8)[index].reshape(*cells.shape, 3)


def _matched(
    cells: NDArray[np.integer[Any]], true: NDArray[np.integer[Any]]
) -> NDArray[np.integer[Any]]:
    """``cells`` under the ids of the true cells they overlap most; the rest under new ids."""
    both = (cells > 0) & (true > 0)
    pairs, pixels = np.unique(np.stack([cells[both], true[both]]), axis=1, return_counts=True)
    names: dict[int, int] = {0: 0}
    taken: set[int] = set()
    for cell, match in pairs[:, np.argsort(-pixels, kind="stable")].T.tolist():
        if cell not in names and match not in taken:
            names[cell] = match
            taken.add(match)
    ids, index = np.unique(cells, return_inverse=True)
    unused = int(true.max(initial=0)) + 1
    renamed = [names.get(int(i), unused + n) for n, i in enumerate(ids)]
    return np.array(renamed, np.int64)[index].reshape(cells.shape)


def _series(
    history: Sequence[Mapping[str, Any]], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one name."""
    points = [(line["step"], line[name]) for line in history if name in line]
    steps, values = np.array(points, np.float64).T
    return steps, values


def _smooth(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The running mean over a fiftieth of the points."""
    span = max(1, len(values) // 50)
    means = np.convolve(values, np.full(span, 1 / span), mode="valid")
    return steps[span // 2 :][: len(means)], means


def _figure(width: float, height: float) -> "Figure":
    """A figure of the given size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'fastunet[plot]'") from error
    # not pyplot: no window system, and no state that outlives the figure
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: "Figure", path: str | Path) -> None:
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary)
