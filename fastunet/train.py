"""Training: batches of tiles, deformed and weighted on the device, and the loop around a step.

Each step draws from a generator seeded by the run's seed and the step's number, so a resumed run
continues the same sequence without any saved generator.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil, cos, inf, isfinite, pi
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .augment import Augmentation, augment
from .checkpoint import CheckpointError, load_checkpoint, restore_optimizer, save_checkpoint
from .data import Section
from .devices import autocast, autocast_dtype
from .metrics import pixel_error
from .ops import weighted_cross_entropy
from .predict import predict
from .report import Report
from .sampling import class_weights, pixel_weights, sample_tiles
from .unet import UNet

LAST, BEST, LOG = "last.safetensors", "best.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Config:
    """How to train.

    Args:
        steps: optimiser steps.
        batch: tiles a step.
        tile: height and width of an input tile, in pixels; one that fits the network.
        optimizer: "sgd" (the paper's, momentum 0.99) or "adamw".
        lr: learning rate, the peak for "one-cycle".
        momentum: of SGD.
        weight_decay: of either optimiser.
        schedule: "constant", or "one-cycle": up over the first tenth, then down along a cosine.
        w0: height of the border term of the weight map; 0 for none.
        sigma: width of the border term, in pixels.
        class_weight: "balanced" gives all classes equal weight in sum over the training set.
        precision: "auto", "float32" or "bfloat16" (of the forward pass, under autocast).
        validate_every: steps between validations and checkpoints.
        seed: of weights, tiles, augmentation and dropout.
        augmentation: what is drawn for each tile.
    Raises: ValueError for values out of range.
    Source: Ronneberger et al. 2015, section 3.
    """

    steps: int = 2000
    batch: int = 1
    tile: int = 316
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.99
    weight_decay: float = 0.0
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    w0: float = 10.0
    sigma: float = 5.0
    class_weight: Literal["balanced", "none"] = "balanced"
    precision: str = "auto"
    validate_every: int = 250
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "tile", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("lr", "sigma"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"train: {name} must be > 0, got {getattr(self, name)}")
        for name in ("w0", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"train: {name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train: momentum must be within 0..1, got {self.momentum}")
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("one-cycle", "constant")),
            ("class_weight", ("balanced", "none")),
            # float16 would need its loss scaled
            ("precision", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                got = repr(getattr(self, name))
                raise ValueError(f"train: {name} must be {' or '.join(allowed)}, got {got}")


class DivergedError(ValueError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: at which step, with which history, and the signal that stopped it."""

    step: int
    history: list[dict[str, Any]]
    stopped_by: int | None


def train_step(
    model: UNet,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    class_weight: Tensor,
    config: Config,
) -> Tensor:
    """One step of gradient descent on images [B, C, H, W], labels [B, 2, H, W]; its loss."""
    margin = _lost(model)
    # cells farther than this from an output pixel add less than w0 * 2e-8 to its weight
    context = min(margin, ceil(6 * config.sigma))
    labels = _centre(labels, margin - context)
    classes, cells = labels[:, 0], labels[:, 1]
    weights = _centre(pixel_weights(classes, cells, class_weight, config.w0, config.sigma), context)
    with autocast(images.device, autocast_dtype(images.device, config.precision)):
        logits = model(images)
        loss = weighted_cross_entropy(
            logits, _centre(classes, context), weights, reduction="weighted_mean"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def validate(
    model: UNet, sections: Sequence[Section], class_weight: Tensor, config: Config
) -> dict[str, float]:
    """Mean weighted loss and pixel error over whole sections, without augmentation."""
    device = class_weight.device
    dtype = autocast_dtype(device, config.precision)
    losses, errors = [], []
    for section in sections:
        probability = torch.from_numpy(predict(model, section.image, autocast=dtype))
        classes = torch.from_numpy(section.classes.astype(np.int64))
        cells = torch.from_numpy(section.cells)
        weights = pixel_weights(classes, cells, class_weight.cpu(), config.w0, config.sigma)
        # log-probabilities are logits of the same softmax
        logits = probability.clamp_min(torch.finfo(torch.float32).tiny).log().unsqueeze(0)
        loss = weighted_cross_entropy(
            logits, classes[None], weights[None], reduction="weighted_mean"
        )
        losses.append(float(loss))
        errors.append(pixel_error(probability.argmax(0).numpy(), section.classes))
    return {"val_loss": float(np.mean(losses)), "val_pixel_error": float(np.mean(errors))}


def fit(
    model: UNet,
    sections: Sequence[Section],
    config: Config,
    folder: Path,
    *,
    validation: Sequence[Section] = (),
    resume: bool = False,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Outcome:
    """Train ``model`` and keep its checkpoints, log and history in ``folder``.

    Writes ``last.safetensors`` at every validation and at the end, ``best.safetensors`` whenever
    the validation loss falls (without validation, with every ``last``), and ``log.jsonl``. SIGINT
    and SIGTERM end the run after the current step, with a checkpoint.

    Args:
        model: the network, on the device to train on.
        sections: the training set.
        config: how to train.
        folder: where the run lives; made if need be.
        validation: sections to validate on.
        resume: continue from ``last.safetensors`` in ``folder``; the result is that of a run that
            was never interrupted.
        quiet: show no progress bar.
        tensorboard: also write TensorBoard events to ``folder``/tensorboard.
    Returns: the last step, the history and the signal that ended the run, if one did.
    Raises: ValueError if the folder holds a run and ``resume`` is not given, if a resumed run's
        network or settings differ, if the tile does not fit the network, or if its output is no
        logits of two classes or more; DivergedError, a ValueError, if the loss is not finite.
    """
    device = next(model.parameters()).device
    if model.n_classes < 2 or model.activation is not None:
        ends = f" and activation {model.activation}" if model.activation else ""
        raise ValueError(
            "train: the network must give logits of at least 2 classes, which the weighted "
            f"cross-entropy compares, got n_classes {model.n_classes}{ends}"
        )
    if model.output_size(config.tile) != config.tile - 2 * _lost(model):
        raise ValueError(
            f"train: tile must fit the network, got {config.tile} pixels; the next that fits: "
            f"{model.fitting_size(config.tile)}"
        )
    class_weight = class_weights(sections, model.n_classes, config.class_weight).to(device)
    optimizer = _optimizer(model, config)
    run = {"network": model.config, "run": asdict(config), "data": _names(sections, validation)}
    state: dict[str, Any] = {"step": 0, "best": None}
    if resume:
        state = _restore(folder / LAST, model, optimizer, run)
    elif (folder / LAST).exists():
        raise ValueError(f"{folder} already holds a run: resume it or choose another folder")
    for leftover in folder.glob(".*.partial.*"):
        leftover.unlink()

    def save(name: str) -> None:
        save_checkpoint(folder / name, model, optimizer, {**state, "resumes": run})

    model.train()
    report = Report(
        folder / LOG,
        config.steps,
        step=state["step"],
        quiet=quiet,
        tensorboard=folder / "tensorboard" if tensorboard else None,
    )
    stopped_by: int | None = None
    with report, _stop_signals() as received:
        while state["step"] < config.steps and not received:
            step = state["step"]
            generator = _seed(config.seed, step)
            images, labels = sample_tiles(
                sections, config.tile, config.batch, _lost(model), generator
            )
            images, labels = augment(
                images.to(device), labels.to(device), config.augmentation, generator
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            loss = float(train_step(model, optimizer, images, labels, class_weight, config))
            if not isfinite(loss):
                raise DivergedError(
                    f"train: the loss is {loss} at step {step + 1}: "
                    f"lower the learning rate ({config.lr})"
                )
            state["step"] = step = step + 1
            lr = optimizer.param_groups[0]["lr"]
            report.line(step, loss=loss, lr=lr)
            report.advance(step, f"loss {_recent(report.history):.4f}, lr {lr:.2g}")
            if step % config.validate_every == 0 or step == config.steps:
                scores = validate(model, validation, class_weight, config) if validation else {}
                if scores:
                    report.line(step, **scores)
                if not scores or state["best"] is None or scores["val_loss"] < state["best"]:
                    state["best"] = scores.get("val_loss")
                    save(BEST)
                save(LAST)
        if received:
            stopped_by = received[0]
            save(LAST)
    return Outcome(state["step"], report.history, stopped_by)


def learning_rate(step: int, config: Config) -> float:
    """The rate for the step after ``step`` steps."""
    if config.schedule == "constant":
        return config.lr
    rise = max(1, config.steps // 10)
    if step < rise:
        return config.lr * (step + 1) / rise
    return config.lr * 0.5 * (1 + cos(pi * (step - rise) / max(1, config.steps - rise)))


def _optimizer(model: UNet, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _restore(
    path: Path, model: UNet, optimizer: torch.optim.Optimizer, run: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Load the checkpoint at ``path`` into both, if it belongs to the same ``run``."""
    saved, tensors, state = load_checkpoint(path)
    if "resumes" not in state:
        raise CheckpointError(f"{path}: holds no run to resume")
    for kind, old in state.pop("resumes").items():
        changed = [key for key, value in run[kind].items() if old.get(key) != value]
        if changed:
            was = ", ".join(f"{key} {old.get(key)} (now {run[kind][key]})" for key in changed)
            raise ValueError(f"{path}: the {kind} to resume had {was}")
    model.load_state_dict(saved.state_dict())
    restore_optimizer(optimizer, tensors)
    return state


def _names(sections: Sequence[Section], validation: Sequence[Section]) -> dict[str, Any]:
    """What tells data sets apart, short enough for a message."""
    return {
        f"{kind} sections": f"{len(some)} from {some[0].name} to {some[-1].name}"
        if some
        else "none"
        for kind, some in (("training", sections), ("validation", validation))
    }


def _centre(tensor: Tensor, margin: int) -> Tensor:
    """The last two axes without ``margin`` pixels on each side."""
    height, width = tensor.shape[-2:]
    return tensor[..., margin : height - margin, margin : width - margin]


def _lost(model: UNet) -> int:
    """Pixels on each side of a tile that the network's output lacks."""
    return model.margin if model.padding == "valid" else 0


def _seed(seed: int, step: int) -> torch.Generator:
    """Seed dropout for this step, and return the generator of everything else."""
    draws = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64)
    torch.manual_seed(int(draws[0] >> 1))
    return torch.Generator().manual_seed(int(draws[1] >> 1))


def _recent(history: list[dict[str, Any]], steps: int = 50) -> float:
    """The mean loss of the last steps."""
    return float(np.mean([line["loss"] for line in history[-steps:] if "loss" in line]))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one acts as it always does."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, stop)
    except ValueError:
        # not the main thread: signals are its business
        previous.clear()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
