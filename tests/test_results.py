"""Files of predictions, and the cells in them."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fastunet import UNet, metrics, results, synthetic
from fastunet.data import standardise
from fastunet.pages import open_pages
from fastunet.predict import predict, predict_pages

from .test_predict import network, pages_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_large_results_are_bigtiff_and_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nothing is written in advance, so the test needs no such disk
    monkeypatch.setattr(results, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    for shapes in ([(60000, 40000)], [(60000, 20000), (60000, 20001)]):
        path = tmp_path / f"{len(shapes)}.tif"
        results.create(path, shapes, np.uint16).page(0)[-1, -1] = 7
        with path.open("rb") as file:
            assert file.read(4) == b"II+\0"
        assert path.stat().st_blocks * 512 < 2**20


def test_a_full_disk_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages_of(tmp_path / "in", [(1, 30, 50)])
    monkeypatch.setattr(results, "disk_usage", lambda path: SimpleNamespace(free=17999))
    with pytest.raises(ValueError, match=r"must have 18000 bytes free, got 17999"):
        predict_pages(network(in_channels=1), open_pages(tmp_path / "in"), tmp_path / "o.tif")
    assert not (tmp_path / "o.tif").exists()


def bright_cells(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Touching cells, dark where they touch and all along their outline; and their ids."""
    _, ids = synthetic.cells(size=(128, 128), count=14, seed=seed)
    ids = ids.astype(np.int32)
    depth = np.zeros(ids.shape)
    for k in range(1, int(ids.max()) + 1):
        depth += ndimage.distance_transform_edt(ids == k)
    return (20 * np.minimum(depth, 8)).astype(np.uint8), ids


def see_through(gain: float, least: float) -> UNet:
    """A network whose foreground is sigmoid(gain (x - least)) of its input x."""
    model = UNet(1, 2, widths=(2,), padding="same")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first, second = (
            m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
        )
        first.weight[0, 0, 1, 1], first.weight[1, 0, 1, 1] = 1, -1
        second.weight[0, 0, 1, 1], second.weight[1, 1, 1, 1] = 1, 1
        model.head.weight[1, :, 0, 0] = torch.tensor([gain, -gain])
        model.head.bias = torch.nn.Parameter(torch.tensor([0, -gain * least]))
    return model.eval()


@pytest.mark.parametrize("seed", [0, 1])
def test_touching_cells_are_numbered(seed: int, tmp_path: Path) -> None:
    image, ids = bright_cells(seed)
    assert ndimage.label(ids > 0)[1] < ids.max(), "no cells touch"
    tifffile.imwrite(tmp_path / "in.tif", image)
    source, path = open_pages(tmp_path / "in.tif"), tmp_path / "out.tif"
    # the outline is background's neighbour: seeds are what is brighter than the gaps
    tell_apart = partial(metrics.instances, method="watershed", smooth_px=0.5)
    predict_pages(
        see_through(4, 0.0), source, path, output="instances", instances=tell_apart, tile=64
    )
    found = tifffile.imread(path).squeeze()
    assert found.dtype == np.uint16
    assert found.max() == len(np.unique(found)) - 1 == len(np.unique(ids)) - 1
    assert metrics.average_precision(found, ids)[0] == 1


def test_the_border_class_parts_cells() -> None:
    _, ids = bright_cells(0)
    grown = ndimage.grey_dilation(ids, 3)
    least = -ndimage.grey_dilation(-np.where(ids == 0, 10**6, ids), 3)
    border = (ids > 0) & (least != grown) & (least < 10**6)
    assert border.any()
    classes = np.where(border, 2, ids > 0)
    p = np.stack([classes == k for k in range(3)]).astype(np.float32)
    p = 0.9 * p + 0.1 / 3
    count = len(np.unique(ids)) - 1
    options: dict[str, Any] = {"method": "watershed", "smooth_px": 0, "seed_threshold": 0.5}
    found = metrics.instances(p, border_class=2, **options)
    assert found.max() == count > metrics.instances(p, **options).max()
    # borders are shared out among the cells
    assert np.array_equal(found > 0, ids > 0)
    assert metrics.average_precision(found, ids)[0] == 1
    with pytest.raises(ValueError, match=r"border_class must be .*, got 3 of 3 for watershed"):
        metrics.instances(p, border_class=3, method="watershed")
    with pytest.raises(ValueError, match=r"border_class must be .*, got 1 of 2 for watershed"):
        metrics.instances(p[1], border_class=1, method="watershed")
    with pytest.raises(ValueError, match=r"border_class must be .*, got 2 of 3 for components"):
        metrics.instances(p, border_class=2)


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_instances_are_those_of_the_prediction(n_classes: int, tmp_path: Path) -> None:
    images = pages_of(tmp_path / "in", [(1, 30, 50), (1, 21, 60)])
    model = network(in_channels=1, n_classes=n_classes)
    probabilities = [predict(model, standardise(image)) for image in images]
    background = probabilities[0][0]
    middle = float(np.median(background if n_classes == 1 else 1 - background))
    tell_apart = partial(metrics.instances, threshold=middle)
    path = tmp_path / "out.tif"
    predict_pages(
        model,
        open_pages(tmp_path / "in"),
        path,
        output="instances",
        instances=tell_apart,
        overlay=tmp_path / "seen",
    )
    assert len(list((tmp_path / "seen").iterdir())) == 2
    with tifffile.TiffFile(path) as file:
        written = [series.asarray() for series in file.series]
    expected = [tell_apart(p) for p in probabilities]
    assert max(page.max() for page in expected) > 3
    for page, ids in zip(written, expected, strict=True):
        assert page.dtype == np.uint16
        assert np.array_equal(page, ids)


@pytest.mark.parametrize("top", [65535, 65536])
def test_ids_have_as_many_bits_as_they_need(top: int, tmp_path: Path) -> None:
    pages_of(tmp_path / "in", [(1, 8, 9)] * 3)
    numbers = iter([1, top, 2])
    predict_pages(
        network(in_channels=1),
        open_pages(tmp_path / "in"),
        tmp_path / "out.tif",
        output="instances",
        instances=lambda p: np.full(p.shape[-2:], next(numbers), np.int32),
    )
    ids = tifffile.imread(tmp_path / "out.tif")
    assert ids.dtype == (np.uint16 if top == 65535 else np.uint32)
    assert ids[:, 0, 0].tolist() == [1, top, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out.tif"]


def test_instances_need_classes_that_exclude_each_other(tmp_path: Path) -> None:
    pages_of(tmp_path / "in", [(1, 8, 9)])
    source, out = open_pages(tmp_path / "in"), tmp_path / "out.tif"
    with pytest.raises(ValueError, match=r"classes that exclude each other, got .* sigmoid"):
        predict_pages(network(in_channels=1, activation="sigmoid"), source, out, output="instances")
    with pytest.raises(ValueError, match=r"output must be one of \('probability', 'label', 'inst"):
        predict_pages(network(in_channels=1), source, out, output="mask")  # type: ignore[arg-type]
    assert not out.exists()
