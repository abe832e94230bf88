"""Tiled prediction against the whole image in one pass; files against arrays."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from fastunet import UNet, tiles
from fastunet.data import standardise
from fastunet.layers import lowered
from fastunet.pages import open_pages
from fastunet.predict import predict, predict_pages
from fastunet.tiles import plan_axis

KINDS: list[tuple[Any, Any]] = list(product(("valid", "same"), ("transpose", "bilinear")))
SIZES = [(1, 1), (1, 300), (2, 3), (37, 50), (61, 131)]
BOUND = 1e-5  # on probabilities

Array = NDArray[np.float32]


def network(padding: Any = "valid", up: Any = "transpose", **options: Any) -> UNet:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"in_channels": 2, "n_classes": 3, "widths": (4, 8, 16)}
    model = UNet(padding=padding, up=up, **defaults | options)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            assert module.bias is not None
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def picture(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def whole(model: UNet, image: Array) -> Array:
    """The network's probabilities for the image as one tile."""
    size = image.shape[1:]
    before = model.margin + model.border if model.padding == "valid" else 0
    inputs = [
        model.fitting_size(n + 2 * before) if before else max(n, 2 ** (model.levels - 1))
        for n in size
    ]
    pads = [(0, 0), *((before, total - n - before) for n, total in zip(size, inputs, strict=True))]
    mirrored = np.pad(image, pads, mode="reflect")
    with torch.inference_mode():
        p = model(torch.from_numpy(mirrored)[None]).softmax(1)[0].numpy()
    lost = model.border
    return p[:, lost : lost + size[0], lost : lost + size[1]]


def difference(model: UNet, image: Array, tile: Any, batch: int = 3) -> float:
    expected = whole(model, image)
    return float(np.abs(predict(model, image, tile=tile, batch=batch) - expected).max())


def fitting_tiles(model: UNet, upto: int) -> list[int]:
    # context on both sides and a step of the pooling grid
    steps = -(-2 * (model.margin + model.border) // model.grid) + 1
    first = steps * model.grid
    return sorted({model.fitting_size(n) for n in range(first, upto, 3)})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_tiled_equals_whole(kind: tuple[str, str], size: tuple[int, int]) -> None:
    model, image = network(*kind), picture(2, *size)
    every = fitting_tiles(model, 84)
    assert len(every) >= 6
    expected = whole(model, image)
    # probabilities that do not move would hide any mistake
    assert min(size) < 9 or expected.std(axis=(1, 2)).min() > 0.01
    for tile in (None, *every, (every[0], every[-1]), (every[-1], every[0])):
        assert np.abs(predict(model, image, tile=tile, batch=32) - expected).max() <= BOUND, tile


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_five_levels(kind: tuple[str, str], norm: str | None) -> None:
    model = network(*kind, widths=(2, 3, 4, 6, 8), norm=norm, variant="paper")
    smallest = fitting_tiles(model, 300)[0]
    assert difference(model, picture(2, 1, 1), None) <= BOUND
    assert difference(model, picture(2, 277, 40), smallest) <= BOUND
    assert difference(model, picture(2, 150, 391), (smallest + 32, smallest + 16)) <= BOUND
    assert difference(model, picture(2, 277, 40), None) <= BOUND


def test_other_networks() -> None:
    for padding in ("valid", "same"):
        assert difference(network(padding, widths=(4,)), picture(2, 9, 14), 7) <= BOUND
        released = network(padding, variant="release")
        assert difference(released, picture(2, 61, 80), released.fitting_size(56)) <= BOUND


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_unaligned_windows_fail(kind: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = network(*kind), picture(2, 61, 131)
    tile = model.fitting_size(64)
    assert difference(model, image, tile) <= BOUND
    aligned = tiles._step
    monkeypatch.setattr(tiles, "_step", lambda given, grid: aligned(given, grid) - 1)
    assert difference(model, image, tile) > 100 * BOUND


@pytest.mark.parametrize("up", ["transpose", "bilinear"])
def test_windows_with_less_context_fail(up: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = network("same", up), picture(2, 61, 131)
    less = model.margin - 1
    monkeypatch.setattr(UNet, "margin", property(lambda self: less))
    assert max(difference(model, image, tile) for tile in range(52, 72, 4)) > BOUND
    if up == "bilinear":
        valid = network("valid", up)
        monkeypatch.undo()
        monkeypatch.setattr(UNet, "border", property(lambda self: 0))
        spoilt = predict(valid, image, tile=44) - predict(valid, image, tile=96)
        assert np.abs(spoilt).max() > BOUND


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.integers(1, 3000),
    st.integers(0, 40),
    st.booleans(),
)
def test_windows_cover_each_pixel_once(
    kind: tuple[Any, Any], levels: int, size: int, steps: int, automatic: bool
) -> None:
    model = UNet(padding=kind[0], up=kind[1], widths=(1,) * levels)
    tile = None if automatic else fitting_tiles(model, 800)[0] + steps * model.grid
    axis = plan_axis(model, size, tile)
    assert model.output_size(axis.length) > 0
    assert tile is None or axis.length <= tile
    assert axis.length <= tiles.LARGEST_TILE_PX
    context, first = model.margin + model.border, 0
    for span in axis.spans:
        assert span.first == first < span.last
        assert (span.start - axis.spans[0].start) % model.grid == 0
        # all of a pixel's context is in the window, or the window ends where the image does
        ends = model.padding == "same"
        assert span.first - span.start >= context or (ends and span.start == 0)
        end = span.start + axis.length
        assert end - span.last >= context or (ends and end >= size == span.last)
        first = span.last
    assert first == size


def test_default_tile_is_no_larger_than_needed() -> None:
    paper = UNet(widths=(1,) * 5)
    lengths = [plan_axis(paper, n).length for n in (1, 4, 5, 388, 512)]
    assert lengths == [188, 188, 204, 572, 700]
    same = UNet(widths=(1,) * 5, padding="same")
    assert [plan_axis(same, n).length for n in (1, 16, 500)] == [16, 16, 512]
    # two windows need fewer pixels than any other number of windows up to 1024
    assert [span.start for span in plan_axis(paper, 1000).spans] == [-92, 404]


class Rows:
    """A page that counts the pixels it is asked for at once."""

    def __init__(self, image: NDArray[Any]) -> None:
        self.image, self.shape, self.dtype, self.most = image, image.shape, image.dtype, 0

    def __getitem__(self, key: Any) -> NDArray[Any]:
        block: NDArray[Any] = self.image[key]
        self.most = max(self.most, block[0].size)
        return block


def test_memory_is_bounded_by_the_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "in.tif", picture(900, 700), photometric="minisblack")
    source, model = open_pages(tmp_path / "in.tif"), network(in_channels=1)
    page = Rows(np.asarray(source.page(0)))
    monkeypatch.setattr(source, "page", lambda i: page)
    monkeypatch.setattr("fastunet.data.page_statistics", lambda *a, **k: (np.zeros(1), np.ones(1)))
    predict_pages(model, source, tmp_path / "out.tif", tile=100)
    assert 0 < page.most <= 100 * 100


def test_inputs_and_outputs() -> None:
    model, image = network(in_channels=1, n_classes=2), picture(70, 45)
    p = predict(model, image, tile=52)
    assert p.dtype == np.float32
    assert p.shape == (2, 70, 45)
    # equal up to the summation order of other batches, and bit for bit for other containers
    assert np.abs(p - predict(model, image, tile=52, batch=100)).max() <= BOUND
    for same in (
        image[None],
        torch.from_numpy(image),
        image.astype(np.float64),
        np.asfortranarray(image),
    ):
        assert np.array_equal(predict(model, same, tile=52), p)
    labels = predict(model, image, tile=52, output="label")
    assert labels.dtype == np.uint8
    assert labels.shape == (70, 45)
    assert np.array_equal(labels, p.argmax(0))
    many = predict(network(in_channels=1, n_classes=300), image, output="label")
    assert many.dtype == np.uint16
    assert many.max() > 255


def test_modes_come_back() -> None:
    model = network("same", norm="batch", dropout=0.9).train()
    frozen = model.contracting[0].eval()
    image = picture(2, 20, 20)
    first = predict(model, image)
    assert model.training
    assert not any(module.training for module in frozen.modules())
    # no dropout, and no statistics of this image
    assert np.array_equal(first, predict(model, image))
    assert np.array_equal(first, predict(model.eval(), image))
    with pytest.raises(ZeroDivisionError):
        predict(model.train(), image, progress=lambda done, total: 1 // 0)  # type: ignore[arg-type]
    assert model.training


def test_precision() -> None:
    model, image = network(), picture(2, 40, 40)
    p = predict(model, image)
    for other in (
        predict(model, image, autocast=torch.bfloat16),
        predict(network().to(torch.bfloat16), image),
    ):
        assert other.dtype == np.float32
        # eight bits of mantissa through ten layers
        assert 0 < np.abs(other - p).max() < 0.1


@pytest.mark.parametrize("norm", [None, "batch"])
def test_weights_converted_once_are_those_of_autocast(
    norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = network(norm=norm), picture(2, 40, 40)
    p = predict(model, image, autocast=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    converted = lowered(model, torch.bfloat16)
    assert len(converted) == (0 if norm else len(list(model.parameters())))
    assert all(value.dtype == torch.bfloat16 for value in converted.values())
    monkeypatch.setattr("fastunet.ensemble.lowered", lambda *_: {})
    assert np.array_equal(predict(model, image, autocast=torch.bfloat16), p)


def test_progress(tmp_path: Path) -> None:
    model, calls = network(in_channels=1), []

    def note(done: int, total: int) -> None:
        calls.append((done, total))

    predict(model, picture(30, 30), tile=60, batch=3, progress=note)
    assert calls == [(3, 4), (4, 4)]
    calls.clear()
    tifffile.imwrite(tmp_path / "a.tif", picture(2, 30, 30), photometric="minisblack")
    source = open_pages(tmp_path / "a.tif")
    predict_pages(model, source, tmp_path / "b.tif", tile=60, batch=4, progress=note)
    assert calls == [(4, 8), (8, 8)]


def pages_of(folder: Path, shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.uint8]]:
    """Write PNG files of random grey or colour values, and return them as [C, H, W]."""
    rng, images = np.random.default_rng(2), []
    folder.mkdir()
    for i, shape in enumerate(shapes):
        images.append(rng.integers(0, 200, shape, dtype=np.uint8))
        Image.fromarray(np.moveaxis(images[-1], 0, -1).squeeze()).save(folder / f"{i}.png")
    return images


@pytest.mark.parametrize("output", ["probability", "label"])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("shapes", [[(1, 30, 50)] * 3, [(1, 30, 50), (1, 7, 9)], [(1, 30, 50)]])
def test_pages(tmp_path: Path, shapes: Any, n_classes: int, output: Any) -> None:
    model = network(in_channels=1, n_classes=n_classes)
    images = pages_of(tmp_path / "in", shapes)
    path = tmp_path / "new" / "out.tif"
    predict_pages(model, open_pages(tmp_path / "in"), path, output=output, tile=60)
    with tifffile.TiffFile(path) as file:
        written = [series.asarray() for series in file.series]
    if len(set(shapes)) == 1:
        (stack,) = written
        written = list(stack)
    for image, page in zip(images, written, strict=True):
        expected = predict(model, standardise(image), output=output, tile=60)
        if output == "probability" and n_classes == 2:
            expected = expected[1]
        assert page.dtype == expected.dtype
        assert np.array_equal(page, expected)
    # read back as they were written: pages as pages, classes as channels
    again = open_pages(path)
    channels = 3 if output == "probability" and n_classes == 3 else 1
    assert [again.shape(i) for i in range(len(again))] == [(channels, *s[1:]) for s in shapes]


def test_colour_pages_and_overlays(tmp_path: Path) -> None:
    pages_of(tmp_path / "in", [(3, 30, 50), (3, 4100, 3)])
    model, source = network(in_channels=3), open_pages(tmp_path / "in")
    predict_pages(model, source, tmp_path / "p.tif", overlay=tmp_path / "seen")
    sizes = [Image.open(tmp_path / "seen" / f"000{i}.png").size for i in (0, 1)]
    assert sizes == [(50, 30), (1, 1367)]
    pages_of(tmp_path / "one", [(3, 30, 50)])
    one = open_pages(tmp_path / "one")
    predict_pages(model, one, tmp_path / "l.tif", output="label", overlay=tmp_path / "l.png")
    with Image.open(tmp_path / "l.png") as from_labels, Image.open(tmp_path / "seen/0000.png") as p:
        assert np.array_equal(np.asarray(from_labels), np.asarray(p))


def test_interrupted_run_leaves_the_old_file(tmp_path: Path) -> None:
    pages_of(tmp_path / "in", [(1, 30, 50)] * 2)
    path = tmp_path / "out" / "p.tif"
    path.parent.mkdir()
    path.write_bytes(b"old")

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_pages(
            network(in_channels=1), open_pages(tmp_path / "in"), path, tile=60, progress=interrupt
        )
    assert [file.name for file in path.parent.iterdir()] == ["p.tif"]
    assert path.read_bytes() == b"old"


ONE = np.zeros((300, 300), np.float32)
REJECTED: list[tuple[str, dict[str, Any], NDArray[Any], dict[str, Any]]] = [
    ("tile must fit .*, got 299 pixels; .* any size: 284 and 300$", {}, ONE, {"tile": 299}),
    ("tile must fit .*, got 188 pixels; .* any size: 204$", {}, ONE, {"tile": 188}),
    ("tile must fit .*, got 0 pixels; .* any size: 204$", {}, ONE, {"tile": (300, 0)}),
    (
        "tile must fit .*, got 100 pixels; .* any size: 208$",
        {"padding": "same"},
        ONE,
        {"tile": (304, 100)},
    ),
    ("image must have 2 channels as the network takes, got 1", {"in_channels": 2}, ONE, {}),
    (r"image must have pixels, got \[1, 0, 300\]", {}, ONE[:0], {}),
    (r"image must be \[C, H, W\] or \[H, W\], got \[300\]", {}, ONE[0], {}),
    ("image must be finite, got NaN or infinity", {}, ONE * np.nan, {}),
    ("batch must be >= 1, got 0", {}, ONE, {"batch": 0}),
    ("output must be probability or label, got 'mask'", {}, ONE, {"output": "mask"}),
]


@pytest.mark.parametrize(("message", "network", "image", "options"), REJECTED)
def test_rejects(
    message: str, network: dict[str, Any], image: NDArray[Any], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"predict: {message}"):
        predict(UNet(widths=(1,) * 5, **network), image, **options)


def test_rejects_integers() -> None:
    images: list[Any] = [np.zeros((9, 9), np.uint8), torch.zeros(9, 9, dtype=torch.int32)]
    for image in images:
        with pytest.raises(TypeError, match=r"image must be floating point, got .*int"):
            predict(network(in_channels=1), image)


def test_rejects_pages(tmp_path: Path) -> None:
    pages_of(tmp_path / "in", [(1, 30, 50), (3, 30, 50)])
    source, out = open_pages(tmp_path / "in"), tmp_path / "out.tif"
    run = partial(predict_pages, network(in_channels=1))
    with pytest.raises(ValueError, match=r"in/1.png must have 1 channels .*, got 3"):
        run(source, out)
    tifffile.imwrite(tmp_path / "nan.tif", np.array([[1, np.nan]], np.float32))
    bad = open_pages(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match=r"nan.tif: wanted finite values"):
        run(bad, out)
    with pytest.raises(ValueError, match=r"nan.tif is an input, give another name"):
        run(bad, tmp_path / "in" / ".." / "nan.tif")
    with pytest.raises(ValueError, match=r"must end in .tif or .tiff, got .*out.png"):
        run(bad, tmp_path / "out.png")
    tifffile.imwrite(tmp_path / "two.tif", np.zeros((2, 5, 6), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match=r"overlay of 2 pages must be a folder, got .*a.png"):
        run(open_pages(tmp_path / "two.tif"), out, overlay=tmp_path / "a.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "nan.tif", "two.tif"]
