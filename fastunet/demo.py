"""The whole path on synthetic cells: draw, train, segment, score, show."""

from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_model
from .data import load_sections
from .devices import pick_device
from .figures import curve, panel
from .metrics import instances, score, summarise
from .ops import weight_map
from .predict import predict
from .synthetic import write_cells
from .train import BEST, LAST, LOG, Config, fit
from .unet import UNet

PAGES, HELD_OUT, SIZE = 12, 4, (256, 256)
WIDTHS = (16, 32, 64, 128)


class InterruptedDemoError(Exception):
    """The signal that ended training before the demo was complete."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"interrupted by signal {signal}")
        self.signal = signal


def run(folder: Path, *, steps: int, device: str, seed: int) -> dict[str, Any]:
    """Leave data, a checkpoint, a figure and scores in ``folder``; a summary comes back.

    Args:
        folder: made if need be; an earlier demo in it is replaced.
        steps: optimiser steps.
        device: as ``pick_device`` takes it.
        seed: of everything random.
    Returns: names and values for a person to read.
    Raises: InterruptedDemoError if a signal ended training.
    """
    images, labels = write_cells(folder, pages=PAGES, size=SIZE, seed=seed)
    last = PAGES - HELD_OUT - 1
    training = load_sections(images, labels, sections=f"0-{last}")
    held_out = load_sections(images, labels, sections=f"{last + 1}-")

    target = pick_device(device)
    torch.manual_seed(seed)
    model = UNet(1, 2, widths=WIDTHS).to(target)
    config = Config(
        steps=steps,
        tile=model.fitting_size(220),
        batch=2,
        optimizer="adamw",
        lr=1e-3,
        validate_every=max(1, steps // 4),
        seed=seed,
    )
    for name in (LAST, BEST, LOG):
        (folder / "run" / name).unlink(missing_ok=True)
    outcome = fit(model, training, config, folder / "run", validation=held_out)
    if outcome.stopped_by is not None:
        raise InterruptedDemoError(outcome.stopped_by)

    best = load_model(folder / "run" / BEST, target)
    probabilities = [predict(best, section.image) for section in held_out]
    pages = [
        score(p, section.classes, section.cells, method="watershed")
        for p, section in zip(probabilities, held_out, strict=True)
    ]
    mean = summarise(pages)
    shown = held_out[0]
    figure, training_curve = folder / "figure.png", folder / "curve.png"
    panel(
        figure,
        shown.image,
        shown.cells,
        instances(probabilities[0][1], method="watershed"),
        weight_map(shown.cells),
        {"pixel error": pages[0].pixel_error, "Rand error": pages[0].adapted_rand_error},
    )
    curve(training_curve, outcome.history)
    return {
        "checkpoint": folder / "run" / BEST,
        "figure": figure,
        "curve": training_curve,
        "pixel error": f"{mean.pixel_error:.4f}",
        "mean IoU": f"{mean.mean_iou:.4f}",
        "Rand error": f"{mean.adapted_rand_error:.4f}",
        "AP at 0.5": f"{mean.average_precision['0.50']:.4f}",
    }
