"""Training: batches of tiles, deformed and weighted on the device, and the loop around a step.

Each step draws from a generator seeded by the run's seed and the step's number, so a resumed run
continues the same sequence without any saved generator.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from math import ceil, isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import distributed, graphs
from .augment import augment
from .config import Config, settings
from .data import Section
from .devices import autocast, autocast_dtype, deterministic
from .learner import Learner
from .metrics import pixel_error
from .ops import weighted_cross_entropy
from .predict import predict
from .profiling import phase, profiled
from .report import Report
from .sampling import RareClasses, class_weights, pixel_weights, sample_tiles
from .schedules import learning_rate
from .unet import UNet

__all__ = [
    "BEST",
    "LAST",
    "LOG",
    "Config",
    "DivergedError",
    "Outcome",
    "fit",
    "learning_rate",
    "train_step",
    "validate",
]

# of a picture for TensorBoard: what it shows is predicted once more
PICTURE_PX = 512

LAST, BEST, LOG = "last.safetensors", "best.safetensors", "log.jsonl"


class DivergedError(ValueError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    ``step`` is its last one, ``history`` the lines of its log, ``stopped_by`` the signal that ended
    it, ``lost_patience`` whether the validation loss had not fallen for too long, ``time_ms`` and
    ``device_time_ms`` the profile of a step by phase.
    """

    step: int
    history: list[dict[str, Any]]
    stopped_by: int | None
    lost_patience: bool = False
    time_ms: dict[str, float] = field(default_factory=dict)
    device_time_ms: dict[str, float] = field(default_factory=dict)


def train_step(
    learner: Learner, images: Tensor, labels: Tensor, class_weight: Tensor, config: Config
) -> Tensor:
    """One step of gradient descent on this process's tiles of a batch.

    The loss is that of the whole batch, over all processes and parts,

        L = sum over pixels x of w(x) E(x) / sum over pixels x of w(x)

    with the loss E and the weight w of a pixel. Each part's sum is divided by the weights of all,
    so that the gradients of the parts add up to that of L.

    Args:
        learner: what is trained.
        images: [B, C, H, W] float32, this process's share of the batch.
        labels: [B, 2, H, W] int32, class ids and cell ids.
        class_weight: [K] float32.
        config: how to train.
    Returns: the share of these tiles in L, a scalar; over all processes the sum is L.
    """
    margin = lost_pixels(learner.model)
    # cells farther than this from an output pixel add less than w0 * 2e-8 to its weight
    context = min(margin, ceil(6 * config.sigma))
    labels = _centre(labels, margin - context)
    classes, cells = labels[:, 0], labels[:, 1]
    processes = distributed.count()
    with phase("loss"):
        weights = pixel_weights(classes, cells, class_weight, config.w0, config.sigma)
        weights = _centre(weights, context)
        # the gradient that comes out is the mean over processes, where the sum is wanted
        weights = weights * (processes / distributed.add_up(weights.sum()))
    classes = _centre(classes, context)
    losses = []
    learner.optimizer.zero_grad(set_to_none=True)
    size = images.shape[0] // config.accumulate
    for first in range(0, images.shape[0], size):
        part = slice(first, first + size)
        with learner.gradients_stay(part.stop < images.shape[0]):
            with autocast(images.device, autocast_dtype(images.device, config.precision)):
                with phase("forward"):
                    logits = learner.forward(
                        images[part], distributed.rank() * images.shape[0] + first
                    )
                with phase("loss"):
                    loss = weighted_cross_entropy(
                        logits, classes[part], weights[part], reduction="sum"
                    )
            with phase("backward"):
                learner.scaler.scale(loss).backward()
        losses.append(loss.detach())
    with phase("optimiser"):
        learner.step()
    return torch.stack(losses).sum() / processes


def validate(
    model: UNet, sections: Sequence[Section], class_weight: Tensor, config: Config
) -> dict[str, float]:
    """Mean weighted loss and pixel error over whole sections, shared among processes.

    Args:
        model: the network.
        sections: at least one, the same in all processes.
        class_weight: [K] float32, on the network's device.
        config: how to train.
    Returns: "val_loss" and "val_pixel_error", the same in all processes.
    """
    device = class_weight.device
    dtype = autocast_dtype(device, config.precision)
    scores = []
    for section in sections[distributed.rank() :: distributed.count()]:
        probability = torch.from_numpy(predict(model, section.image, autocast=dtype))
        classes = torch.from_numpy(section.classes.astype(np.int64))
        cells = torch.from_numpy(section.cells)
        weights = pixel_weights(classes, cells, class_weight.cpu(), config.w0, config.sigma)
        # log-probabilities are logits of the same softmax
        logits = probability.clamp_min(torch.finfo(torch.float32).tiny).log().unsqueeze(0)
        loss = weighted_cross_entropy(
            logits, classes[None], weights[None], reduction="weighted_mean"
        )
        scores.append((float(loss), pixel_error(probability.argmax(0).numpy(), section.classes)))
    losses, errors = zip(*distributed.gather(scores, len(sections)), strict=True)
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
    profile: Path | None = None,
) -> Outcome:
    """Train ``model`` and keep its checkpoints, log and history in ``folder``.

    Writes ``last.safetensors`` at every validation and at the end, ``best.safetensors`` whenever
    the validation loss falls (without validation, with every ``last``), and ``log.jsonl``. SIGINT
    and SIGTERM end the run after the current step, with a checkpoint.

    In a process group (``distributed.joined``) every process calls it with the same arguments; each
    takes its share of every batch and of the validation, and the first one writes. The result is
    that of one process up to rounding; with batch normalisation it is not, since each process
    normalises its own tiles, as it does each part of an accumulated batch.

    Args:
        model: the network, on the device to train on.
        sections: the training set.
        config: how to train.
        folder: where the run lives; made if need be.
        validation: sections to validate on.
        resume: continue from ``last.safetensors`` in ``folder``, with any number of processes; the
            result is that of a run that was never interrupted.
        quiet: show no progress bar.
        tensorboard: also write TensorBoard events to ``folder``/tensorboard, with a picture of the
            first validation section's segmentation at each validation.
        profile: folder for a trace of a few steps; the times of their phases come back.
    Returns: how the run ended.
    Raises: ValueError if the folder holds a run and ``resume`` is not given, if a resumed run's
        network or settings differ, if the tile does not fit the network, if the batch does not
        divide among the processes, or if the network's output is no logits of two classes or more,
        or if patience has no validation; DivergedError, a ValueError, if the loss is not finite;
        ProcessLostError, an OSError, if another process has ended.
    """
    device = next(model.parameters()).device
    mine = _check(model, config)
    if config.patience is not None and not validation:
        raise ValueError("train: patience must have validation sections to go by, got none")
    margin = lost_pixels(model)
    class_weight = class_weights(sections, model.n_classes, config.class_weight).to(device)
    run = {"network": model.config, "run": settings(config), "data": _names(sections, validation)}
    if not resume and (folder / LAST).exists():
        raise ValueError(f"{folder} already holds a run: resume it or choose another folder")
    learner = Learner(model, config)
    rare = None
    if config.rare_classes:
        rare = RareClasses(sections, model.n_classes, config.rare_classes)
    state: dict[str, Any] = {"step": 0, "best": None, "stale": 0}
    if resume:
        state |= learner.restore(folder / LAST, run)
    writes = distributed.rank() == 0
    if writes:
        for leftover in folder.glob(".*.partial.*"):
            leftover.unlink()

    def save(name: str) -> None:
        if writes:
            learner.save(folder / name, {**state, "resumes": run})

    def cut(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
        images, labels = sample_tiles(
            sections, config.tile, config.batch, margin, generator, part=mine, rare=rare
        )
        return images, labels, generator

    tiles = None
    model.train()
    report = Report(
        folder / LOG if writes else None,
        config.steps,
        step=state["step"],
        quiet=quiet or not writes,
        tensorboard=folder / "tensorboard" if tensorboard and writes else None,
    )
    with (
        closing(learner),
        report,
        deterministic(config.deterministic),
        _stop_signals() as received,
        distributed.naming_the_lost(),
        profiled(profile if writes else None) as profiler,
    ):
        while not (stopped_by := distributed.agreed(received, device)):
            step = state["step"]
            lost_patience = config.patience is not None and state["stale"] >= config.patience
            if step >= config.steps or lost_patience:
                break
            of_dropout, generator = _seeds(config.seed, step)
            torch.manual_seed(of_dropout)
            with phase("input"):
                if tiles is None:
                    tiles = cut(generator)
                images, labels, generator = tiles
                images, labels = augment(
                    images.to(device),
                    labels.to(device),
                    config.augmentation,
                    generator,
                    batch=config.batch,
                    part=mine,
                )
            for group in learner.optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            share = train_step(learner, images, labels, class_weight, config)
            with phase("input"):
                # while a GPU computes
                tiles = cut(_seeds(config.seed, step + 1)[1])
            loss = float(distributed.add_up(share))
            if not isfinite(loss):
                raise DivergedError(
                    f"train: the loss is {loss} at step {step + 1}: "
                    f"lower the learning rate ({config.lr})"
                )
            if profiler is not None:
                profiler.step()
            state["step"] = step = step + 1
            lr = learner.optimizer.param_groups[0]["lr"]
            report.line(step, loss=loss, lr=lr)
            report.advance(step, f"loss {_recent(report.history):.4f}, lr {lr:.2g}")
            if step % config.validate_every == 0 or step == config.steps:
                scores = {}
                if validation:
                    scores = validate(learner.result, validation, class_weight, config)
                    report.line(step, **scores)
                    if tensorboard and writes:
                        report.picture(
                            step, "segmentation", _picture(learner.result, validation[0])
                        )
                state["stale"] += 1
                if not scores or state["best"] is None or scores["val_loss"] < state["best"]:
                    state["best"], state["stale"] = scores.get("val_loss"), 0
                    save(BEST)
                save(LAST)
        if stopped_by:
            save(LAST)
    return Outcome(
        state["step"],
        report.history,
        stopped_by,
        lost_patience=stopped_by is None and lost_patience,
        time_ms=profiler.time_ms if profiler else {},
        device_time_ms=profiler.device_time_ms if profiler else {},
    )


def _check(model: UNet, config: Config) -> slice:
    """Raise unless ``model`` can be trained so; this process's share of a batch."""
    if model.n_classes < 2 or model.activation is not None:
        ends = f" and activation {model.activation}" if model.activation else ""
        raise ValueError(
            "train: the network must give logits of at least 2 classes, which the weighted "
            f"cross-entropy compares, got n_classes {model.n_classes}{ends}"
        )
    if model.output_size(config.tile) != config.tile - 2 * lost_pixels(model):
        raise ValueError(
            f"train: tile must fit the network, got {config.tile} pixels; the next that fits: "
            f"{model.fitting_size(config.tile)}"
        )
    if config.cuda_graph and (
        why_not := graphs.unsupported_in_training(model, distributed.count())
    ):
        raise ValueError(f"train: cuda_graph takes {why_not}")
    return distributed.share(config.batch, config.accumulate)


def _names(sections: Sequence[Section], validation: Sequence[Section]) -> dict[str, Any]:
    """What tells data sets apart, short enough for a message."""
    return {
        f"{kind} sections": f"{len(some)} from {some[0].name} to {some[-1].name}"
        if some
        else "none"
        for kind, some in (("training", sections), ("validation", validation))
    }


def _picture(model: UNet, section: Section) -> NDArray[np.uint8]:
    """The middle of a section with what ``model`` makes of it, [H, W, 3]."""
    from .figures import overlay

    starts = (max(0, (n - PICTURE_PX) // 2) for n in section.classes.shape)
    rows, columns = (slice(start, start + PICTURE_PX) for start in starts)
    image = np.ascontiguousarray(section.image[:, rows, columns])
    return overlay(image, predict(model, image, output="label"))


def _centre(tensor: Tensor, margin: int) -> Tensor:
    """The last two axes without ``margin`` pixels on each side."""
    height, width = tensor.shape[-2:]
    return tensor[..., margin : height - margin, margin : width - margin]


def lost_pixels(model: UNet) -> int:
    """Pixels on each side of a tile that the network's output lacks."""
    return model.margin if model.padding == "valid" else 0


def _seeds(seed: int, step: int) -> tuple[int, torch.Generator]:
    """The seed of a step's dropout, and the generator of everything else."""
    draws = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64)
    return int(draws[0] >> 1), torch.Generator().manual_seed(int(draws[1] >> 1))


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
