"""Several networks: the mean of their probabilities, whatever else is asked for."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from fastunet import UNet
from fastunet.data import standardise
from fastunet.metrics import instances
from fastunet.pages import open_pages
from fastunet.predict import predict, predict_pages

from .test_predict import BOUND, Array, network, picture

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = ((4, 8, 16), (2, 3, 4), (3, 5, 8))


def several(count: int = 3, **options: Any) -> list[UNet]:
    """Networks that disagree, of different widths."""
    return [network("same", widths=WIDTHS[i], **options) for i in range(count)]


def mean(models: list[UNet], image: Array, **options: Any) -> Array:
    p: Array = np.mean([predict(model, image, **options) for model in models], axis=0)
    return p


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("options", [{}, {"n_classes": 1}, {"activation": "sigmoid"}], ids=str)
def test_is_the_mean(padding: str, options: dict[str, Any]) -> None:
    models = [network(padding, widths=widths, **options) for widths in WIDTHS]
    image = picture(2, 50, 70)
    run = partial(predict, image=image, tile=60, batch=2)
    p, each = run(models), [run(model) for model in models]
    assert p.dtype == np.float32
    assert np.abs(p - np.mean(each, axis=0)).max() <= BOUND
    # each of them counts
    assert min(np.abs(p - one).max() for one in each) > 100 * BOUND
    # half of a sum of two is exact
    assert np.array_equal(run(models[:2]), (each[0] + each[1]) / 2)
    assert np.array_equal(run(tuple(models)), p)
    assert np.abs(predict(models, image) - p).max() <= BOUND


def test_one_is_that_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    forward = UNet.forward

    def noted(self: UNet, x: Any, output: Any = "logit") -> Any:
        asked.append(output)
        return forward(self, x, output)

    monkeypatch.setattr(UNet, "forward", noted)
    model, image = network(), picture(2, 30, 30)
    for output in ("probability", "label"):
        alone = predict(model, image, output=output)
        assert np.array_equal(predict([model], image, output=output), alone)
        assert asked == [output] * 2
        asked.clear()


@pytest.mark.parametrize("n_classes", [1, 3])
def test_labels_are_those_of_the_mean(n_classes: int) -> None:
    """Where one network is sure and two are not, a vote would be another."""
    models, image = several(n_classes=n_classes), picture(2, 50, 70)
    with torch.no_grad():
        for model, offset in zip(models, (2.0, -0.5, -0.5), strict=True):
            logits = model(torch.from_numpy(image)[None])
            assert model.head.bias is not None
            model.head.bias -= logits.mean((0, 2, 3))
            model.head.bias[0] += offset
    for tta in (False, True):
        p = predict(models, image, tta=tta)
        labels = predict(models, image, output="label", tta=tta)
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, p.argmax(0) if n_classes > 1 else p[0] > 0.5)
        assert len(np.unique(labels)) > 1
        votes = np.stack([predict(model, image, output="label", tta=tta) for model in models])
        assert not np.array_equal(labels, np.median(votes, axis=0))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_of_turned_tiles(autocast: torch.dtype | None) -> None:
    models, image = several(2), picture(2, 50, 70)
    run = partial(predict, image=image, tile=60, batch=2, autocast=autocast, tta=True)
    p = run(models)
    assert np.abs(p - (run(models[0]) + run(models[1])) / 2).max() <= BOUND
    assert np.abs(p - predict(models, image, tile=60)).max() > 100 * BOUND


def test_autocast_and_dtype() -> None:
    models, image = several(2), picture(2, 50, 70)
    lower = predict(models, image, autocast=torch.bfloat16)
    assert np.array_equal(lower, mean(models, image, autocast=torch.bfloat16))
    for model in models:
        model.double()
    exact = predict(models, image)
    assert exact.dtype == np.float32
    assert 0 < np.abs(exact - lower).max() < 0.1


def test_widths_norm_and_variant_may_differ() -> None:
    models = [network(), network(widths=(2, 3, 4), norm="batch"), network(variant="release")]
    image = picture(2, 40, 40)
    assert np.abs(predict(models, image) - mean(models, image)).max() <= BOUND


def test_modes_come_back() -> None:
    models = [network("same", dropout=0.9).train(), network("same"), network("same", norm="batch")]
    models[2].train()
    frozen = models[0].contracting[0].eval()
    image = picture(2, 20, 20)
    # the first one twice, in evaluation both times
    first = predict([*models, models[0]], image)
    assert [model.training for model in models] == [True, False, True]
    assert not any(module.training for module in frozen.modules())
    assert np.array_equal(first, predict([*models, models[0]], image))
    with pytest.raises(ZeroDivisionError):
        predict(models, image, progress=lambda done, total: 1 // 0)  # type: ignore[arg-type]
    assert [model.training for model in models] == [True, False, True]


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_pages(n_classes: int, tta: bool, tmp_path: Path) -> None:
    models = several(in_channels=1, n_classes=n_classes)
    pixels = np.random.default_rng(2).integers(0, 200, (2, 30, 50), np.uint8)
    tifffile.imwrite(tmp_path / "in.tif", pixels, photometric="minisblack")
    source, path = open_pages(tmp_path / "in.tif"), tmp_path / "out.tif"
    ids_of = partial(instances, method="components", threshold=0.45)
    p = [predict(models, standardise(page[None]), tta=tta) for page in pixels]
    foreground = [page if n_classes > 2 else page[-1] for page in p]
    wanted: dict[Any, list[Any]] = {
        "probability": foreground,
        "label": [page.argmax(0) if n_classes > 1 else page[0] > 0.5 for page in p],
        "instances": [ids_of(page) for page in foreground],
    }
    for output, want in wanted.items():
        predict_pages(models, source, path, output=output, tta=tta, instances=ids_of)
        assert np.array_equal(tifffile.imread(path), np.stack(want)), output


UNLIKE: list[tuple[dict[str, Any], str]] = [
    ({"in_channels": 1}, "1 channels, the first 2"),
    ({"n_classes": 2}, "2 classes, the first 3"),
    ({"activation": "sigmoid"}, "activation sigmoid, the first None"),
    ({"widths": (4, 8)}, "2 levels, the first 3"),
    ({"padding": "valid"}, "padding valid, the first same"),
    ({"up": "bilinear"}, "up bilinear, the first transpose"),
    ({"odd": "crop"}, "odd crop, the first None"),
]


@pytest.mark.parametrize(("options", "message"), UNLIKE)
def test_rejects_networks_that_are_unlike(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    models = [network("same"), network("same"), network(**{"padding": "same", **options})]
    want = f"^predict: network 3 has {re.escape(message)}$"
    with pytest.raises(ValueError, match=want):
        predict(models, picture(2, 40, 40))
    tifffile.imwrite(tmp_path / "in.tif", picture(40, 40))
    with pytest.raises(ValueError, match=want):
        predict_pages(models, open_pages(tmp_path / "in.tif"), tmp_path / "out.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


def test_rejects_other_devices_dtypes_and_none() -> None:
    image = picture(2, 40, 40)
    with pytest.raises(ValueError, match="network 2 has device meta, the first cpu"):
        predict([network(), network().to("meta")], image)
    with pytest.raises(ValueError, match=r"2 has dtype torch.bfloat16, the first torch.float32"):
        predict([network(), network().bfloat16()], image)
    with pytest.raises(ValueError, match="predict: model must be a network or several, got none"):
        predict([], image)


def test_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    models, image = several(2), picture(2, 40, 40)
    assert np.abs(predict(models, image) - mean(models, image)).max() <= BOUND
    monkeypatch.setattr("fastunet.ensemble._mean", lambda each, x: each[0](x))
    assert np.abs(predict(models, image) - mean(models, image)).max() > 100 * BOUND
