"""What the commands share: the application, consoles, options and how results are printed."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(
    help="U-Nets, fast: train, predict and score the network of Ronneberger et al. 2015.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Images = Annotated[
    Path, typer.Option(help="Multi-page TIFF, folder of PNG/JPEG/TIFF, .npy or Zarr.")
]
Labels = Annotated[
    Path, typer.Option(help="Class ids, 0/255 masks or instance ids; files as for the images.")
]
LabelKind = Annotated[
    Literal["auto", "classes", "instances"], typer.Option(help="What label values mean.")
]
Separate = Annotated[
    int, typer.Option(help="Background carved between touching instances, in pixels.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Precision = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Checkpoints = Annotated[
    list[Path],
    typer.Option(
        "--checkpoint",
        help="A file that fastunet train or convert wrote; given again, the mean of all networks.",
    ),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Every command takes --debug and --help."""


def progress_bar(hidden: bool) -> Progress:
    """A bar that leaves nothing behind, for a person who looks at a terminal."""
    return Progress(console=err, transient=True, disable=hidden or not err.is_terminal)


def print_result(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(values) + "\n")
        return
    width = max(map(len, values))
    for name, value in values.items():
        if value is not None:
            out.print(f"{name:>{width}}  {value}", highlight=False, soft_wrap=True)


def integers(option: str, text: str) -> tuple[int, ...]:
    """The numbers of "64,128"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be integers joined by commas, got {text!r}") from None
