"""``fastunet predict``, ``evaluate`` and ``weight-map``: from files and checkpoints to results."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from .common import (
    AsJson,
    Checkpoints,
    Device,
    Images,
    LabelKind,
    Labels,
    Precision,
    Separate,
    app,
    out,
    print_result,
    progress_bar,
)

if TYPE_CHECKING:
    import torch

    from ..metrics import Scores, SplitMerge
    from ..unet import UNet

Tta = Annotated[
    bool, typer.Option("--tta", help="Mean over eight orientations of each tile: 8 times as long.")
]
Method = Annotated[
    Literal["components", "watershed"], typer.Option(help="How cells are told apart.")
]
Threshold = Annotated[float, typer.Option(help="Foreground is above it.")]
SeedThreshold = Annotated[float, typer.Option(help="Watershed seeds are above it.")]
Smooth = Annotated[float, typer.Option(help="Smoothing before seeding, in pixels.")]
LOST = "run the command again"


@app.command()
def predict(
    images: Annotated[Path, typer.Argument(help="Files as for train.")],
    checkpoints: Checkpoints,
    output: Annotated[Path, typer.Option("--output", "-o", help="TIFF file to write.")] = Path(
        "prediction.tif"
    ),
    kind: Annotated[
        Literal["probability", "label", "instances"], typer.Option(help="What the TIFF holds.")
    ] = "probability",
    instances: Method = "watershed",
    threshold: Threshold = 0.5,
    seed_threshold: SeedThreshold = 0.8,
    smooth: Smooth = 2.0,
    border_class: Annotated[
        int | None, typer.Option(help="Class of the borders between cells, for instances.")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="PNG, or a folder of PNGs, with outlines on the image.")
    ] = None,
    tile: Annotated[int | None, typer.Option(help="Input tile, in pixels; as fits best.")] = None,
    batch: Annotated[int, typer.Option(help="Tiles at once.")] = 1,
    tta: Tta = False,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Launch the network's kernels together; by default where a GPU can.",
        ),
    ] = None,
    precision: Precision = "float32",
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Segment images of any size, in overlapping tiles with mirrored borders."""
    import numpy as np

    from ..devices import autocast_dtype
    from ..distributed import agree, joined, naming_the_lost, rank
    from ..metrics import instances as tell_apart
    from ..pages import open_pages
    from ..predict import predict_pages

    with joined(device) as target, naming_the_lost("predict", LOST):
        source, models = agree(lambda: (open_pages(images), _networks(checkpoints, target)))
        ids_of = partial(
            tell_apart,
            method=instances,
            threshold=threshold,
            seed_threshold=seed_threshold,
            smooth_px=smooth,
            border_class=border_class,
        )
        if kind == "instances":
            # what its options cannot be is said before the first page is predicted
            n_classes = models[0].n_classes
            planes = (n_classes,) if n_classes > 2 else ()
            agree(lambda: ids_of(np.full((*planes, 1, 1), 1 / n_classes)))
        with progress_bar(quiet or as_json or rank() > 0) as progress:
            task = progress.add_task("predicting", total=None)
            predict_pages(
                models,
                source,
                output,
                output=kind,
                tile=tile,
                batch=batch,
                autocast=autocast_dtype(target, precision),
                tta=tta,
                cuda_graph=cuda_graph,
                instances=ids_of,
                overlay=overlay,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if rank() > 0:
            return
    result = {
        "pages": len(source),
        "output": str(output),
        "overlay": None if overlay is None else str(overlay),
    }
    print_result(result, as_json)


@app.command()
def evaluate(
    images: Images,
    labels: Labels,
    checkpoints: Checkpoints,
    sections: Annotated[
        str | None, typer.Option(help='Pages to score, such as "24-29"; all by default.')
    ] = None,
    label_kind: LabelKind = "auto",
    separate: Separate = 1,
    instances: Method = "watershed",
    threshold: Threshold = 0.5,
    seed_threshold: SeedThreshold = 0.8,
    smooth: Smooth = 2.0,
    tile: Annotated[int | None, typer.Option(help="Input tile, in pixels; as fits best.")] = None,
    tta: Tta = False,
    precision: Precision = "float32",
    challenge: Annotated[
        bool,
        typer.Option("--challenge", help="Also by the EM challenge: best threshold, warping."),
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint, or the mean of several, on labelled images."""
    from ..data import load_sections
    from ..devices import autocast_dtype
    from ..distributed import agree, count, dealt, joined, naming_the_lost, rank
    from ..metrics import Scores, score, summarise
    from ..predict import predict

    with joined(device) as target, naming_the_lost("evaluate", LOST):
        models = agree(lambda: _networks(checkpoints, target))
        n_classes, activation = models[0].n_classes, models[0].activation
        if n_classes > 1 and activation is not None:
            raise ValueError(
                f"{checkpoints[0]}: evaluate compares classes that exclude each other, got a "
                f"network with a {activation} for each of {n_classes}"
            )
        loaded = agree(
            lambda: load_sections(
                images,
                labels,
                sections=sections,
                # a network of one class tells it from the background
                n_classes=max(2, n_classes),
                label_kind=label_kind,
                separate=separate,
            )
        )
        dtype = autocast_dtype(target, precision)
        with progress_bar(as_json or rank() > 0) as progress:
            task = progress.add_task("scoring", total=len(range(rank(), len(loaded), count())))

            def score_page(i: int) -> Scores:
                probability = predict(models, loaded[i].image, tile=tile, autocast=dtype, tta=tta)
                scores = score(
                    probability[0] if n_classes == 1 else probability,
                    loaded[i].classes,
                    loaded[i].cells,
                    method=instances,
                    threshold=threshold,
                    seed_threshold=seed_threshold,
                    smooth_px=smooth,
                    challenge=challenge,
                )
                progress.advance(task)
                return scores

            scored = dealt(score_page, len(loaded))
        if rank() > 0:
            return
    pages = {section.name: scores for section, scores in zip(loaded, scored, strict=True)}
    mean = summarise(list(pages.values()))
    if as_json:
        each = {name: page.to_dict() for name, page in pages.items()}
        print_result({"mean": mean.to_dict(), "pages": each}, as_json)
        return
    table = Table("page", "pixel error", "Dice", "Rand error", "V_Rand", "V_Info", "AP 0.5", "SEG")
    for name, page in pages.items():
        values = (
            page.pixel_error,
            page.dice[1],
            page.adapted_rand_error,
            page.v_rand.score,
            page.v_info.score,
            page.average_precision["0.50"],
            page.segmentation_accuracy,
        )
        table.add_row(name, *(f"{value:.4f}" for value in values))
    out.print(table)
    out.print(f"mean of {len(pages)} pages, cells by {instances}")
    print_result(_rows(mean), as_json)


def _networks(checkpoints: list[Path], device: "torch.device") -> "list[UNet]":
    """The networks of checkpoints; what does not fit together is told of files, not of numbers."""
    from ..checkpoint import load_model
    from ..ensemble import difference

    models: list[UNet] = []
    for i, path in enumerate(checkpoints):
        if path.resolve() in (other.resolve() for other in checkpoints[:i]):
            raise ValueError(f"{path}: is given as a checkpoint twice")
        models.append(load_model(path, device))
        if unlike := difference(models[0], models[-1]):
            raise ValueError(f"{path}: has {unlike[0]}, {checkpoints[0]} {unlike[1]}")
    return models


def _rows(mean: "Scores") -> dict[str, str]:
    """Mean scores by name, for a person."""
    from ..metrics import maximal

    def parts(score: "SplitMerge") -> str:
        return f"{score.score:.4f} (split {score.split:.4f}, merge {score.merge:.4f})"

    rows = {
        "pixel error": f"{mean.pixel_error:.4f}",
        "IoU by class": ", ".join(f"{value:.4f}" for value in mean.iou),
        "Dice by class": ", ".join(f"{value:.4f}" for value in mean.dice),
        "adapted Rand error": f"{mean.adapted_rand_error:.4f}",
        "variation of information": f"{mean.vi_split:.4f} split, {mean.vi_merge:.4f} merge",
        "V_Rand, borders thinned": parts(mean.v_rand),
        "V_Info, borders thinned": parts(mean.v_info),
        "average precision": ", ".join(
            f"{value:.3f} at {t}" for t, value in mean.average_precision.items() if t[-1] == "0"
        ),
        "SEG": f"{mean.segmentation_accuracy:.4f}",
        "cells": f"{mean.predicted_instances:.1f} found, {mean.true_instances:.1f} true",
    }
    if mean.challenge:
        for name, curve in (("V_Rand", mean.challenge.v_rand), ("V_Info", mean.challenge.v_info)):
            threshold, best = maximal(curve)
            rows[f"maximal {name}"] = f"{parts(best)} at {threshold}"
        rows["warping error"] = f"{mean.challenge.warping_error:.6f}"
    return rows


@app.command()
def weight_map(
    labels: Annotated[Path, typer.Argument(help="Labels; files as for train.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="TIFF file to write.")],
    w0: Annotated[float, typer.Option(help="Height of the border weights.")] = 10.0,
    sigma: Annotated[float, typer.Option(help="Width of the border weights, in pixels.")] = 5.0,
    class_weight: Annotated[
        Literal["balanced", "none"], typer.Option(help="Class part of the weights, page by page.")
    ] = "balanced",
    label_kind: LabelKind = "auto",
    separate: Separate = 1,
    png: Annotated[Path | None, typer.Option(help="Picture of the first page's weights.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the border weights of labels, one float32 page for each of theirs."""
    import tifffile

    from .. import ops
    from ..data import open_cells
    from ..figures import heat, write_png
    from ..files import replacing

    if output.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"weight-map: the output must end in .tif or .tiff, got {output}")
    source, pages = open_cells(labels, label_kind=label_kind, separate=separate)
    weighed_bytes = sum(4 * h * w for _, h, w in map(source.shape, range(len(source))))
    with (
        progress_bar(quiet or as_json) as progress,
        replacing(output) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=weighed_bytes > 2**32 - 2**25) as tif,
    ):
        for i, cells in enumerate(progress.track(pages, len(source), description="weighing")):
            weights = ops.weight_map(
                cells,
                w0=w0,
                sigma=sigma,
                class_weight=None if class_weight == "none" else class_weight,
            )
            tif.write(weights, photometric="minisblack", contiguous=True)
            if png is not None and i == 0:
                write_png(png, heat(weights))
    result = {
        "pages": len(source),
        "output": str(output),
        "png": None if png is None else str(png),
    }
    print_result(result, as_json)
