"""Training learns, resumes exactly, stops cleanly and never leaves a broken checkpoint."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastunet.train as train_module
from fastunet import UNet, load_model, ops, weight_map
from fastunet.augment import Augmentation, augment
from fastunet.checkpoint import load_checkpoint
from fastunet.cli import main
from fastunet.data import load_sections
from fastunet.learner import Learner
from fastunet.report import read_log
from fastunet.sampling import class_weights, pixel_weights, sample_tiles
from fastunet.synthetic import write_cells
from fastunet.train import BEST, LAST, LOG, Config, DivergedError, fit, learning_rate, train_step

from .sections import section, small_config, small_model

STILL = Augmentation(elastic_px=0, rotation="none", flip=False, contrast=0, brightness=0)


def weights_of(path: Path) -> list[torch.Tensor]:
    return list(load_model(path).state_dict().values())


def fit_small(folder: Path, config: Config, **options: Any) -> train_module.Outcome:
    torch.manual_seed(1)
    return fit(small_model(), [section(0), section(1)], config, folder, quiet=True, **options)


def test_overfits_one_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet(1, 2, widths=(8, 16, 32), dropout=0.0)
    config = small_config(
        steps=400, tile=84, optimizer="adamw", lr=5e-3, validate_every=400, w0=0.0,
        augmentation=STILL,
    )  # fmt: skip
    only = section(0, size=44)
    outcome = fit(model, [only], config, tmp_path, quiet=True)
    losses = [line["loss"] for line in outcome.history if "loss" in line]
    assert losses[0] > 0.4
    assert np.mean(losses[-10:]) < 0.01


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_resumed_is_uninterrupted(
    optimizer: Any, stop: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(optimizer=optimizer)
    validation = [section(2)]
    whole = fit_small(tmp_path / "whole", config, validation=validation)
    assert (whole.step, whole.stopped_by) == (8, None)

    with monkeypatch.context() as patch:
        calls = []

        def step_and_signal(*args: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), stop)
            return train_step(*args)

        patch.setattr(train_module, "train_step", step_and_signal)
        cut = fit_small(tmp_path / "cut", config, validation=validation)
    assert (cut.step, cut.stopped_by) == (5, stop)
    rest = fit_small(tmp_path / "cut", config, validation=validation, resume=True)
    assert (rest.step, rest.stopped_by) == (8, None)

    for name in (LAST, BEST):
        pairs = zip(
            weights_of(tmp_path / "whole" / name), weights_of(tmp_path / "cut" / name), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    timeless = [
        [{**line, "seconds": 0} for line in read_log(tmp_path / run / LOG)]
        for run in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]


def test_lost_steps_leave_the_log(tmp_path: Path) -> None:
    fit_small(tmp_path, small_config())
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 9, "seconds": 1, "loss": 0.5}\n{"step": 10, "sec')
    fit_small(tmp_path, small_config(), resume=True)
    assert [line["step"] for line in read_log(tmp_path / LOG)] == list(range(1, 9))


def test_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.2, 0.4])
    monkeypatch.setattr(
        train_module, "validate", lambda *_: {"val_loss": next(scores), "val_pixel_error": 0.0}
    )
    fit_small(tmp_path, small_config(), validation=[section(2)])
    _, _, best = load_checkpoint(tmp_path / BEST)
    _, _, last = load_checkpoint(tmp_path / LAST)
    assert (best["step"], last["step"]) == (6, 8)
    assert best["best"] == last["best"] == 0.2


def train_for_ever(images: Path, labels: Path, run: Path, *flags: str) -> None:
    """The command line, in a process that is killed."""
    torch.set_num_threads(1)
    sys.argv = [
        "fastunet", "train", "--images", str(images), "--labels", str(labels), "--output", str(run),
        "--widths", "4,8,16", "--tile", "60", "--steps", "1000000", "--validate-every", "1",
        "--quiet", *flags,
    ]  # fmt: skip
    main()


@pytest.mark.slow
def test_killed_ten_times(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    write_cells(data, pages=2, size=(96, 96), count=6)
    files = (data / "images.tif", data / "labels.tif")
    # its processes are forks of one that has imported all this, and what an optimizer imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    rng = random.Random(0)
    reached = [0]
    for _ in range(10):
        resume = ["--resume"] if (run / LAST).exists() else []
        process = context.Process(target=train_for_ever, args=(*files, run, *resume))
        process.start()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            time.sleep(0.05)
            lines = read_log(run / LOG)
            if lines and lines[-1]["step"] > reached[-1] + 1:
                break
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        _, _, state = load_checkpoint(run / LAST)
        load_model(run / BEST)
        reached.append(state["step"])
    assert reached == sorted(set(reached))


def test_refuses_to_overwrite_or_change_a_run(tmp_path: Path) -> None:
    fit_small(tmp_path, small_config())
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        fit_small(tmp_path, small_config())
    with pytest.raises(ValueError, match=r"the run to resume had lr 0.001 \(now 0.002\)"):
        fit_small(tmp_path, small_config(lr=2e-3), resume=True)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"the network to resume had .*padding valid \(now same"):
        fit(
            UNet(1, 2, widths=(4, 8, 16), padding="same"),
            [section(0)],
            small_config(),
            tmp_path,
            resume=True,
            quiet=True,
        )
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"the data to resume had training sections 2 from page 0"):
        fit(small_model(), [section(1)], small_config(), tmp_path, resume=True, quiet=True)
    assert (tmp_path / LAST).read_bytes() == before
    with pytest.raises(ValueError, match="no such checkpoint"):
        fit_small(tmp_path / "empty", small_config(), resume=True)


def test_divergence_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"the loss is \w+ at step \d+: lower the learning"):
        fit_small(tmp_path, small_config(steps=200, lr=1e12, schedule="constant"))


def test_tile_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 61 pixels; the nearest that fit: 60 and 64"):
        fit_small(tmp_path, small_config(tile=61))


def test_tiles_are_windows_of_the_mirrored_section() -> None:
    source = section(0)
    padded = np.pad(source.image, ((0, 0), (20, 20), (20, 20)), mode="reflect")
    cells = np.pad(source.cells, 20, mode="reflect")
    images, labels = sample_tiles([source], 60, 8, 20, torch.Generator().manual_seed(0))
    assert images.shape == (8, 1, 60, 60)
    assert labels.shape == (8, 2, 60, 60)
    for image, label in zip(images.numpy(), labels.numpy(), strict=True):
        places = [
            (i, j)
            for i in range(77)
            for j in range(77)
            if np.array_equal(padded[:, i : i + 60, j : j + 60], image)
        ]
        assert len(places) == 1
        i, j = places[0]
        assert np.array_equal(cells[i : i + 60, j : j + 60], label[1])
        assert np.array_equal(label[0], label[1] > 0)


def test_small_sections_are_mirrored_to_a_tile() -> None:
    images, _ = sample_tiles([section(0, size=32)], 60, 2, 0, torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, 60, 60)


def test_pixel_weights_are_equation_2() -> None:
    source = section(0)
    cells = torch.from_numpy(source.cells)[None]
    classes = (cells > 0).to(torch.int32)
    class_weight = torch.tensor([2.0, 0.5])
    got = pixel_weights(classes, cells, class_weight, w0=10.0, sigma=5.0)
    want = weight_map(cells, w0=10.0, sigma=5.0, class_weight=class_weight)
    torch.testing.assert_close(got, want)
    plain = pixel_weights(classes, cells, class_weight, w0=0.0, sigma=5.0)
    assert torch.equal(plain, class_weight[classes.long()])


def test_class_weights_balance() -> None:
    sections = [section(0), section(1)]
    weights = class_weights(sections, 2, "balanced")
    counts = np.bincount(np.concatenate([s.classes.ravel() for s in sections]), minlength=2)
    assert float(weights[0]) * counts[0] == pytest.approx(float(weights[1]) * counts[1])
    assert float(weights @ torch.from_numpy(counts).float()) == pytest.approx(counts.sum())
    assert class_weights(sections, 3, "balanced")[2] == 1
    assert torch.equal(class_weights(sections, 2, "none"), torch.ones(2))


def test_border_weights_fire_between_touching_cells() -> None:
    source = section(0)
    cells = torch.from_numpy(source.cells)[None]
    weights = pixel_weights((cells > 0).int(), cells, torch.ones(2), w0=10.0, sigma=5.0)
    assert weights.max() > 8


def test_learning_rate() -> None:
    config = small_config(steps=100, lr=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    constant = small_config(schedule="constant", lr=0.5)
    assert {learning_rate(step, constant) for step in range(8)} == {0.5}


def test_config_rejects() -> None:
    for options, message in (
        ({"steps": 0}, "train: steps must be >= 1, got 0"),
        ({"lr": float("nan")}, "lr must be > 0, got nan"),
        ({"momentum": 1.0}, "momentum must be within"),
        ({"optimizer": "adam"}, "optimizer must be sgd or adamw, got 'adam'"),
        ({"w0": -1.0}, "w0 must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            small_config(**options)


def test_tensorboard_and_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    outcome = fit_small(tmp_path, small_config(), validation=[section(2)], tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events*"))
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert lines == outcome.history
    assert {"step", "seconds", "loss", "lr"} <= lines[0].keys()
    assert "val_loss" in lines[-1]


def test_fused_and_eager_networks_learn_alike(em_folder: Path) -> None:
    """The same weights and tiles give the same loss for 50 steps, on real sections."""
    sections = load_sections(em_folder / "train-volume.tif", em_folder / "train-labels.tif")[:2]
    config = small_config(steps=50, tile=108, optimizer="adamw", w0=0.0)
    losses: list[list[float]] = []
    for module in (ops, ops.eager):
        torch.manual_seed(0)
        model = UNet(1, 2, widths=(8, 16, 32), ops=module)
        learner = Learner(model, config)
        weight = class_weights(sections, 2, "balanced")
        losses.append([])
        for step in range(config.steps):
            generator = train_module._seeds(0, step)[1]
            images, labels = sample_tiles(sections, 108, 1, model.margin, generator)
            images, labels = augment(images, labels, config.augmentation, generator)
            loss = train_step(learner, images, labels, weight, config)
            losses[-1].append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0][-1] < losses[0][0]
