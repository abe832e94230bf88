"""What prediction asks the network for, and what comes of it, for each kind of network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch import Tensor

import fastunet
from fastunet import UNet
from fastunet.data import standardise
from fastunet.pages import open_pages
from fastunet.predict import predict, predict_pages

from .test_predict import BOUND, Array, network, picture

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS: list[dict[str, Any]] = [
    {},
    {"n_classes": 1},
    {"activation": "sigmoid"},
    {"n_classes": 1, "activation": "sigmoid"},
]


def balanced(**options: Any) -> UNet:
    """A network whose classes, or both sides of 0.5, are all there."""
    model = network("same", **options)
    with torch.no_grad():
        logits = model(torch.from_numpy(picture(2, 64, 80))[None])
        if model.activation:
            logits = logits.logit()
        assert model.head.bias is not None
        model.head.bias -= logits.mean((0, 2, 3))
    return model


def probabilities(model: UNet, image: Array) -> Tensor:
    """Of the whole image, from the logits."""
    with torch.inference_mode():
        y = model(torch.from_numpy(image)[None])[0]
    if model.activation:
        return y
    return y.sigmoid() if model.n_classes == 1 else y.softmax(0)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_follow_from_the_logits(options: dict[str, Any]) -> None:
    model, image = balanced(**options), picture(2, 64, 80)
    want = probabilities(model, image)
    p = predict(model, image, tile=52, batch=2)
    assert p.dtype == np.float32
    assert np.abs(p - want.numpy()).max() <= BOUND
    for tta in (False, True):
        p = predict(model, image, tile=52, batch=2, tta=tta)
        labels = predict(model, image, tile=52, batch=2, output="label", tta=tta)
        assert np.array_equal(labels, p.argmax(0) if len(p) > 1 else p[0] > 0.5)
        assert len(np.unique(labels)) == max(2, len(p))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_probabilities_are_not_rounded(options: dict[str, Any]) -> None:
    """Of a network in bfloat16 the logits may be, what is made of them is not."""
    model, image = balanced(**options).bfloat16(), picture(2, 64, 80)
    p = torch.from_numpy(predict(model, image, tile=52))
    assert not torch.equal(p, p.bfloat16().float())
    with torch.inference_mode():
        y = model(torch.from_numpy(image)[None].bfloat16(), "probability")[0]
    assert y.dtype == torch.float32
    assert (y - p).abs().max() < 0.1


def test_asks_for_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    forward = UNet.forward

    def noted(self: UNet, x: Tensor, output: Any = "logit") -> Tensor:
        y = forward(self, x, output)
        asked.append((output, y.dtype, y.ndim))
        return y

    monkeypatch.setattr(UNet, "forward", noted)
    model, image = network(in_channels=1, n_classes=2), picture(1, 40, 40)
    probability, label = ("probability", torch.float32, 4), ("label", torch.uint8, 3)
    for options, want in (
        ({}, probability),
        ({"output": "label"}, label),
        ({"output": "label", "tta": True}, probability),
        ({"output": "label", "autocast": torch.bfloat16}, label),
        ({"autocast": torch.bfloat16}, probability),
    ):
        asked.clear()
        predict(model, image, **options)
        assert set(asked) == {want}, options
    tifffile.imwrite(tmp_path / "in.tif", np.arange(1600, dtype=np.uint16).reshape(40, 40))
    source = open_pages(tmp_path / "in.tif")
    outputs: tuple[Any, ...] = ("probability", "label", "instances")
    for output in outputs:
        asked.clear()
        predict_pages(model, source, tmp_path / "out.tif", output=output)
        assert set(asked) == {label if output == "label" else probability}


def test_foreground_is_the_last_class(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "in.tif", np.arange(1600, dtype=np.uint16).reshape(40, 40))
    source = open_pages(tmp_path / "in.tif")
    for options in ({"n_classes": 2}, {"n_classes": 1}, {"n_classes": 2, "activation": "sigmoid"}):
        model = network(in_channels=1, **options)
        predict_pages(model, source, tmp_path / "out.tif")
        want = predict(model, standardise(source.page(0)))[-1]
        assert np.array_equal(tifffile.imread(tmp_path / "out.tif").squeeze(), want)


def test_the_eager_twin_predicts_the_same() -> None:
    image = picture(2, 64, 80)
    twin = network("same", ops=fastunet.ops.eager)
    p = predict(network("same"), image)
    assert np.abs(p - predict(twin, image)).max() <= BOUND
    assert np.array_equal(predict(twin, image, output="label"), predict(twin, image).argmax(0))
