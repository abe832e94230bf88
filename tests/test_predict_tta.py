"""Test-time augmentation against a loop over turned images."""

from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
import torch

from fastunet import UNet
from fastunet.data import standardise
from fastunet.pages import open_pages
from fastunet.predict import predict, predict_pages
from fastunet.tiles import _whole_tile

from .test_predict import BOUND, KINDS, Array, fitting_tiles, network, picture

pytestmark = pytest.mark.usefixtures("one_thread")
TURNS = list(product(range(4), (False, True)))


def turn(image: Array, turns: int, flipped: bool) -> Array:
    image = image[..., ::-1] if flipped else image
    return np.ascontiguousarray(np.rot90(image, turns, (-2, -1)))


def back(image: Array, turns: int, flipped: bool) -> Array:
    image = np.rot90(image, -turns, (-2, -1))
    return image[..., ::-1] if flipped else image


def sizes(model: UNet, *near: int) -> tuple[int, ...]:
    """Sizes near those given whose pooling grid is the same from either end."""
    context = model.margin + model.border
    if model.padding == "same":
        return tuple(-(-n // model.grid) * model.grid for n in near)
    return tuple(model.fitting_size(n + 2 * context) - 2 * context for n in near)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_is_the_mean_over_turned_images(kind: tuple[str, str]) -> None:
    model = network(*kind)
    image = picture(2, *sizes(model, 37, 62))
    mean = predict(model, image, tta=True)
    turned = [predict(model, turn(image, *by)) for by in TURNS]
    loop = np.mean([back(p, *by) for p, by in zip(turned, TURNS, strict=True)], axis=0)
    assert np.abs(mean - loop).max() <= BOUND
    # the network alone sees which way is up
    plain = predict(model, image)
    assert np.abs(mean - plain).max() > 100 * BOUND
    for by, of_turned in zip(TURNS[1:], turned[1:], strict=True):
        again = predict(model, turn(image, *by), tta=True)
        assert np.abs(back(again, *by) - mean).max() <= BOUND, by
        assert np.abs(back(of_turned, *by) - plain).max() > 100 * BOUND, by


@pytest.mark.parametrize("size", [(1, 1), (37, 50), (50, 71)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_tiled_equals_whole(kind: tuple[str, str], size: tuple[int, int]) -> None:
    model, image = network(*kind), picture(2, *size)
    # one window over all, as it was planned for the image alone
    lengths = [_whole_tile(model, n) for n in size]
    before = model.margin + model.border if model.padding == "valid" else 0
    pads = [(before, length - n - before) for n, length in zip(size, lengths, strict=True)]
    x = np.pad(image, [(0, 0), *pads], mode="reflect" if min(size) > 1 else "edge")
    with torch.inference_mode():
        turned = [model(torch.tensor(turn(x, *by))[None]).softmax(1)[0].numpy() for by in TURNS]
    mean = np.mean([back(p, *by) for p, by in zip(turned, TURNS, strict=True)], axis=0)
    lost = model.border
    expected = mean[:, lost : lost + size[0], lost : lost + size[1]]
    every = fitting_tiles(model, 84)
    for tile in (None, (every[0], every[-1]), (every[-1], every[1])):
        tiled = predict(model, image, tile=tile, batch=16, tta=True)
        assert np.abs(tiled - expected).max() <= BOUND, tile


def test_memory_is_that_of_the_tiles() -> None:
    model, seen = network(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    predict(model, picture(2, 70, 90), tile=(52, 60), batch=2)
    plain = seen.copy()
    seen.clear()
    predict(model, picture(2, 70, 90), tile=(52, 60), batch=2, tta=True)
    assert len(seen) == 8 * len(plain)
    assert {(b, c, *sorted(size)) for b, c, *size in seen} == set(plain)


@pytest.mark.parametrize("n_classes", [1, 3])
def test_labels_and_pages(n_classes: int, tmp_path: Path) -> None:
    model: Any = network(in_channels=1, n_classes=n_classes)
    with torch.no_grad():
        # so that one class has both labels
        model.head.bias -= model(torch.zeros(1, 1, 60, 60)).mean() if n_classes == 1 else 0
    image = np.random.default_rng(2).integers(0, 200, (1, 30, 50), np.uint8)
    tifffile.imwrite(tmp_path / "in.tif", image[0])
    p = predict(model, standardise(image), tta=True)
    labels = predict(model, standardise(image), output="label", tta=True)
    assert np.array_equal(labels, p.argmax(0) if n_classes > 1 else p[0] > 0.5)
    assert len(np.unique(labels)) > 1
    assert not np.array_equal(labels, predict(model, standardise(image), output="label"))
    outputs: tuple[tuple[Literal["label", "probability"], Array], ...] = (
        ("label", labels),
        ("probability", p.squeeze()),
    )
    for output, expected in outputs:
        path = tmp_path / f"{output}.tif"
        predict_pages(model, open_pages(tmp_path / "in.tif"), path, output=output, tta=True)
        assert np.array_equal(tifffile.imread(path).squeeze(), expected)
