"""``fastunet train``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ..augment import Augmentation, Rotation
from ..config import Config
from .common import (
    AsJson,
    Device,
    Images,
    LabelKind,
    Labels,
    Separate,
    app,
    err,
    integers,
    out,
    print_result,
)

defaults = Config()
drawn = Augmentation()


# options of the network, which a checkpoint brings along
NETWORK = ("widths", "padding", "norm", "up", "dropout", "variant")


@app.command()
def train(
    context: typer.Context,
    images: Images,
    labels: Labels,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/unet"),
    train_sections: Annotated[
        str | None, typer.Option(help='Pages to train on, such as "0-23" or "0-9,12-".')
    ] = None,
    val_sections: Annotated[
        str | None, typer.Option(help="Pages to validate on; without them best is last.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="Folds to split --train-sections into, one to validate on.")
    ] = None,
    fold: Annotated[int | None, typer.Option(help="Which of them that is, from 0.")] = None,
    label_kind: LabelKind = "auto",
    separate: Separate = 1,
    classes: Annotated[int, typer.Option(help="Classes, background included.")] = 2,
    widths: Annotated[str, typer.Option(help="Channels of each level.")] = "64,128,256,512,1024",
    padding: Annotated[
        Literal["valid", "same"], typer.Option(help="valid is the paper's.")
    ] = "valid",
    norm: Annotated[Literal["none", "batch"], typer.Option(help="none is the paper's.")] = "none",
    up: Annotated[
        Literal["transpose", "bilinear"], typer.Option(help="transpose is the paper's.")
    ] = "transpose",
    dropout: Annotated[float, typer.Option(help="At the end of the contracting path.")] = 0.5,
    variant: Annotated[
        Literal["paper", "release"], typer.Option(help="release is the authors' published one.")
    ] = "paper",
    init: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to start from: its network and weights, not its run."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = defaults.steps,
    batch: Annotated[int, typer.Option(help="Tiles a step, of all processes.")] = defaults.batch,
    accumulate: Annotated[
        int, typer.Option(help="Parts to go through them in, to need less memory.")
    ] = defaults.accumulate,
    tile: Annotated[int, typer.Option(help="Input tile, in pixels.")] = defaults.tile,
    optimizer: Annotated[
        Literal["sgd", "adamw"], typer.Option(help="sgd is the paper's.")
    ] = defaults.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate (peak).")] = defaults.lr,
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = defaults.momentum,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = defaults.weight_decay,
    schedule: Annotated[
        Literal["one-cycle", "constant", "cosine", "poly"],
        typer.Option(help="Of the learning rate."),
    ] = defaults.schedule,
    warmup: Annotated[
        int | None,
        typer.Option(help="Steps of rising learning rate; one-cycle: a tenth, others: none."),
    ] = defaults.warmup,
    clip_norm: Annotated[
        float | None, typer.Option(help="Scale gradients down to this norm.")
    ] = defaults.clip_norm,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the weights' average, such as 0.999, to keep.")
    ] = defaults.ema,
    rare_classes: Annotated[
        float, typer.Option(help="Probability of a tile around a pixel of a class drawn evenly.")
    ] = defaults.rare_classes,
    w0: Annotated[float, typer.Option(help="Height of the border weights; 0: none.")] = defaults.w0,
    sigma: Annotated[
        float, typer.Option(help="Width of the border weights, in pixels.")
    ] = defaults.sigma,
    class_weight: Annotated[
        Literal["balanced", "none"], typer.Option(help="Class part of the weights.")
    ] = defaults.class_weight,
    elastic: Annotated[
        float, typer.Option(help="Elastic displacements, standard deviation in pixels.")
    ] = drawn.elastic_px,
    rotation: Annotated[Rotation, typer.Option(help="Random rotation.")] = drawn.rotation,
    flip: Annotated[bool, typer.Option(help="Random mirroring.")] = drawn.flip,
    contrast: Annotated[float, typer.Option(help="Random factor on grey values.")] = drawn.contrast,
    brightness: Annotated[
        float, typer.Option(help="Random offset of grey values.")
    ] = drawn.brightness,
    validate_every: Annotated[
        int, typer.Option(help="Steps between validations and checkpoints.")
    ] = defaults.validate_every,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a lower loss.")
    ] = defaults.patience,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = defaults.seed,
    precision: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16 (with a scaled loss).")
    ] = defaults.precision,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="PyTorch's deterministic algorithms alone.")
    ] = False,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Launch the network's kernels together; by default where a GPU can.",
        ),
    ] = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write events too.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a trace of ten steps; their times are printed.")
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Keep less for backward and compute it again: slower."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a U-Net on images and labels."""
    import torch

    from .. import distributed, sampling
    from ..checkpoint import load_model
    from ..data import load_sections
    from ..train import BEST, fit
    from ..unet import UNet

    config = Config(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        tile=tile,
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        clip_norm=clip_norm,
        ema=ema,
        rare_classes=rare_classes,
        w0=w0,
        sigma=sigma,
        class_weight=class_weight,
        precision=precision,
        validate_every=validate_every,
        patience=patience,
        deterministic=deterministic,
        cuda_graph=cuda_graph,
        seed=seed,
        augmentation=Augmentation(
            elastic_px=elastic,
            rotation=rotation,
            flip=flip,
            contrast=contrast,
            brightness=brightness,
        ),
    )

    if (folds is None) != (fold is None) or (folds is not None and val_sections):
        raise ValueError("--folds and --fold go together, and without --val-sections")

    sources = {name: context.get_parameter_source(name) for name in NETWORK}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if init is not None and given:
        raise ValueError(f"--{given[0]} and --init do not go together: {init} has its own")

    def load(chosen: str | None) -> Any:
        return load_sections(
            images,
            labels,
            sections=chosen,
            n_classes=classes,
            label_kind=label_kind,
            separate=separate,
        )

    with distributed.joined(device) as target:
        writes = distributed.rank() == 0
        training, validation = distributed.agree(
            lambda: (load(train_sections), load(val_sections) if val_sections else [])
        )
        if folds is not None and fold is not None:
            training, validation = sampling.fold(training, folds, fold)
        torch.manual_seed(seed)
        channels = training[0].image.shape[0]

        def network() -> UNet:
            if init is None:
                return UNet(
                    channels,
                    classes,
                    widths=integers("--widths", widths),
                    padding=padding,
                    norm=None if norm == "none" else norm,
                    up=up,
                    dropout=dropout,
                    variant=variant,
                    recompute=recompute or None,
                )
            started = load_model(init, recompute=recompute or None)
            for what, has, want in (
                ("channels", started.in_channels, channels),
                ("classes", started.n_classes, classes),
            ):
                if has != want:
                    raise ValueError(f"{init}: has {has} {what}, the data {want}")
            return started.train()

        model = distributed.agree(network).to(target)
        outcome = fit(
            model,
            training,
            config,
            output,
            validation=validation,
            resume=resume,
            quiet=quiet or as_json,
            tensorboard=tensorboard,
            profile=profile,
        )
    if outcome.stopped_by is not None:
        if writes:
            err.print(
                f"stopped at step {outcome.step}; continue with the same command and --resume"
            )
        raise typer.Exit(128 + outcome.stopped_by)
    if not writes:
        return
    early = f"the validation loss has not fallen for {patience} validations"
    summary: dict[str, Any] = {
        "steps": outcome.step,
        "stopped early": early if outcome.lost_patience else None,
        "checkpoint": str(output / BEST),
        "curve": _curve(output / "curve.png", outcome.history),
    }
    if as_json and profile:
        summary |= {"time_ms": outcome.time_ms, "device_time_ms": outcome.device_time_ms}
    elif profile:
        _print_profile(outcome.time_ms, outcome.device_time_ms)
    print_result(summary, as_json)


def _print_profile(time_ms: dict[str, float], device_time_ms: dict[str, float]) -> None:
    """The phases of a step: time and share, on a GPU also that of the kernels."""
    on_gpu = any(device_time_ms.values())
    table = Table("phase of a step", "ms", "share", *(["ms on the GPU"] if on_gpu else []))
    for name, time in time_ms.items():
        share = f"{time / sum(time_ms.values()):.1%}"
        table.add_row(name, f"{time:.2f}", share, *([f"{device_time_ms[name]:.2f}"] * on_gpu))
    out.print(table)


def _curve(path: Path, history: list[dict[str, Any]]) -> str | None:
    from ..figures import curve

    try:
        curve(path, history)
    except ValueError as error:
        err.print(f"no training curve: {error}")
        return None
    return str(path)
