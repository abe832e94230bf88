"""``fastunet doctor``, ``bench``, ``tune`` and ``demo``."""

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .. import __version__
from .common import AsJson, Device, app, err, integers, out, print_result

if TYPE_CHECKING:
    import torch


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say which device, which backend serves each operator, and why another does not."""
    import torch

    from .. import backends
    from ..devices import autocast_dtype, pick_device

    device = pick_device()
    dtype = autocast_dtype(device)
    facts = {
        "fastunet": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": str(device),
        "processor": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": "float32" if dtype is None else str(dtype).removeprefix("torch."),
        "extension": backends.EXTENSION_MISSING or "loaded",
    }
    rows = backends.report()
    served = {(row.operator, row.device): row.backend for row in rows}
    if device.type == "cuda" and served["conv_relu", "cuda"] == "triton":
        facts["convolutions"] = _tuned(device)
    if as_json:
        print_result({**facts, "operators": [asdict(row) for row in rows]}, as_json)
        return
    print_result(facts, as_json)
    table = Table("operator", "device", "served by", "why nothing faster")
    for row in rows:
        table.add_row(row.operator, row.device, row.backend, row.why)
    out.print(table)


def _tuned(device: "torch.device") -> str:
    """Where the choice of kernels for convolutions comes from."""
    from ..ops.conv_relu import tiles

    path = tiles.cache_path(device)
    float32 = "float32 in cuDNN unless TF32 is allowed"
    if path.exists():
        return f"Triton or cuDNN as measured in {path}; {float32}"
    return f"Triton or cuDNN by a rule, which `fastunet tune` replaces; {float32}"


@app.command()
def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(help="What to time; everything by default.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16; repeatable.")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Height and width, in pixels; repeatable.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images at once; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes on a laptop.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose names match this expression.")] = "",
    without: Annotated[
        str | None, typer.Option(help="Leave out contenders whose names match this.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the rows to.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps rows and charts of each device; resumes what it has."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no case after these, and exit with 3.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for charts.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Rows of an earlier run.")] = None,
    fail_under: Annotated[
        float | None, typer.Option(help="Exit with 1 if a ratio to eager is below it.")
    ] = None,
) -> None:
    """Time the operators and the network against eager PyTorch and others."""
    from fastunet_benchmarks.run import run

    # ends the timing, and what was timed by then is drawn and reported
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = run(
        operators or (),
        device=device,
        dtypes=dtype or (),
        sizes=size or (),
        batches=batch or (),
        quick=quick,
        only=only,
        without=without,
        json_path=json_file,
        record_in=record,
        minutes=minutes,
        plot=plot,
        compare=compare,
        fail_under=fail_under,
        console=out,
    )
    raise typer.Exit(status)


@app.command()
def tune(
    device: Device = "auto",
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16 (the default), float16, float32; repeatable.")
    ] = None,
    size: Annotated[int, typer.Option(help="Height and width of the images, in pixels.")] = 572,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 1,
    widths: Annotated[
        str, typer.Option(help="Channels of the network's levels.")
    ] = "64,128,256,512,1024",
) -> None:
    """Find the fastest kernel for each convolution on this GPU, and keep it for later runs."""
    from fastunet_benchmarks.tune import tune as run

    from ..devices import PRECISIONS, pick_device
    from ..unet import UNet

    chosen = pick_device(device)
    if chosen.type != "cuda":
        raise ValueError("tune measures kernels of a GPU, and this torch finds none to use")
    dtypes = dtype or ["bfloat16"]
    for name in dtypes:
        if name not in PRECISIONS:
            raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    levels = integers("--widths", widths)
    fitting = UNet(widths=levels).fitting_size(size)
    path = run(chosen, dtypes=dtypes, size=fitting, batch=batch, widths=levels, console=out)
    print_result({"cache": str(path)}, as_json=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to leave everything in.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 800,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Draw synthetic cells, train on them, segment others, score and show the result."""
    from ..demo import InterruptedDemoError, run

    try:
        result = run(output, steps=steps, device=device, seed=seed)
    except InterruptedDemoError as error:
        err.print("stopped before the demo was complete; the same command starts it anew")
        raise typer.Exit(128 + error.signal) from None
    print_result(result, as_json=False)
