"""Recorded networks: the results of those that are not, for each shape; refused without a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastunet import UNet, graphs
from fastunet.augment import Augmentation
from fastunet.config import Config
from fastunet.graphs import Recorded, recorded_for_training
from fastunet.predict import predict
from fastunet.train import fit

from .sections import section

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
LAST = torch.channels_last


def network(**options: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(widths=(8, 16, 32), **options)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_each_shape_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens around a recording, with one that computes instead."""
    recorded = []

    def record(self: Recorded, source: Tensor) -> tuple[Callable[[], None], Tensor, Tensor]:
        recorded.append(source.shape)
        result = torch.empty(source.shape)

        def replay() -> None:
            result.copy_(2 * source)

        return replay, source, result

    monkeypatch.setattr(Recorded, "_record", record)
    twice = Recorded(lambda x: 2 * x)
    for shape in ((2, 1, 5, 6), (1, 1, 5, 6), (2, 1, 5, 6), (1, 1, 6, 5)):
        x = torch.randn(shape)
        assert torch.equal(twice(x), 2 * x)
    # an image turned, as test-time augmentation shows it, needs no recording of its own
    turned = torch.randn(1, 1, 6, 5).rot90(1, (2, 3))
    assert torch.equal(twice(turned), 2 * turned)
    assert recorded == [(2, 1, 5, 6), (1, 1, 5, 6), (1, 1, 6, 5)]


def test_records_what_comes_often(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def record(self: Recorded, source: Tensor) -> tuple[Callable[[], None], Tensor, Tensor]:
        recorded.append(source.shape)
        return lambda: None, source, source

    monkeypatch.setattr(Recorded, "_record", record)
    network = Recorded(lambda x: x.clone(), patience=2)
    for size in (5, 5, 6, 5, 5, 6):
        x = torch.randn(1, 1, size, size)
        assert torch.equal(network(x), x)
    assert recorded == [(1, 1, 5, 5)]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"predict: cuda_graph takes .* CUDA device, got cpu"):
        predict(network(), image(60, 60), cuda_graph=True)
    with pytest.raises(ValueError, match=r"train: cuda_graph takes .* CUDA device, got cpu"):
        fit(network(), [section(0)], Config(tile=60, cuda_graph=True), tmp_path)
    model = network(recompute=True)
    with pytest.raises(ValueError, match="recompute"):
        fit(model, [section(0)], Config(tile=60, cuda_graph=True), tmp_path)
    with pytest.raises(ValueError, match="whole batches, got accumulate 2"):
        Config(batch=2, accumulate=2, cuda_graph=True)
    assert graphs.unsupported(torch.device("cuda", 1)) is None


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"norm": "batch", "padding": "same"}], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_predicts_the_same(options: dict[str, Any], autocast: torch.dtype | None) -> None:
    model = network(**options).cuda()
    # a last batch of another size, and pages of other sizes
    for size in ((90, 130), (70, 70)):
        for tta in (False, True):
            plain, recorded, often = (
                predict(
                    model,
                    image(*size),
                    tile=60,
                    batch=4,
                    autocast=autocast,
                    tta=tta,
                    cuda_graph=cuda_graph,
                )
                for cuda_graph in (False, True, None)
            )
            assert np.array_equal(plain, recorded)
            assert np.array_equal(plain, often)


def test_each_network_of_several_has_its_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recording that computes, into the same memory each time, and runs on any device."""
    recorded = []

    def record(self: Recorded, source: Tensor) -> tuple[Callable[[], None], Tensor, Tensor]:
        recorded.append(source.shape)
        result = self._network(source)

        def replay() -> None:
            result.copy_(self._network(source))

        return replay, source, result

    monkeypatch.setattr(Recorded, "_record", record)
    monkeypatch.setattr(graphs, "unsupported", lambda device: None)
    models = [network().eval(), network(norm="batch").eval()]
    for tta in (False, True):
        plain, replayed = (
            predict(models, image(70, 70), tile=60, batch=4, tta=tta, cuda_graph=cuda_graph)
            for cuda_graph in (False, True)
        )
        assert np.array_equal(plain, replayed)
        # windows of 20 pixels over 70: a batch of four, over and over
        assert recorded == [(4, 1, 60, 60)] * 2
        recorded.clear()


@needs_gpu
def test_several_predict_the_same() -> None:
    models = [network().cuda(), network(norm="batch").cuda()]
    for tta in (False, True):
        plain, recorded = (
            predict(models, image(90, 130), tile=60, batch=4, tta=tta, cuda_graph=cuda_graph)
            for cuda_graph in (False, True)
        )
        assert np.array_equal(plain, recorded)


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"norm": "batch"}], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_trains_the_same(options: dict[str, Any], precision: str, tmp_path: Path) -> None:
    curves, models = [], []
    for cuda_graph in (False, True):
        model = network(**options).cuda()
        config = Config(
            steps=8,
            batch=2,
            tile=60,
            precision=precision,
            cuda_graph=cuda_graph,
            augmentation=Augmentation(elastic_px=0),
        )
        outcome = fit(model, [section(0)], config, tmp_path / str(cuda_graph), quiet=True)
        curves.append([line["loss"] for line in outcome.history if "loss" in line])
        models.append(model)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert len(set(curves[0])) == 8
    for a, b in zip(*(model.buffers() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@needs_gpu
def test_another_shape_is_refused() -> None:
    model = network().cuda().train()
    x = torch.randn(1, 1, 60, 60, device="cuda").to(memory_format=LAST)
    recorded = recorded_for_training(model, x, None)
    recorded(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"takes \[1, 1, 60, 60\], got \[1, 1, 76, 76\]"):
        recorded(torch.randn(1, 1, 76, 76, device="cuda").to(memory_format=LAST))
