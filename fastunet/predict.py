"""Prediction: any image, in tiles, with the result of the whole image.

    image -> windows, mirrored at the borders -> network, or several -> one array or file

Memory is bounded by a batch of tiles; images and results may be mapped from files.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import graphs
from .augment import mirror
from .ensemble import Run, networks, running
from .files import replacing
from .tiles import Axis, Span, plan_axis
from .unet import UNet

if TYPE_CHECKING:
    from .pages import Page, PageSource

Output = Literal["probability", "label"]
PageOutput = Literal["probability", "label", "instances"]
Tile = int | tuple[int, int] | None
Progress = Callable[[int, int], None]
Plan = tuple[Axis, Axis]


def predict(
    model: UNet | Sequence[UNet],
    image: NDArray[np.floating[Any]] | Tensor,
    *,
    tile: Tile = None,
    batch: int = 1,
    output: Output = "probability",
    autocast: torch.dtype | None = None,
    tta: bool = False,
    cuda_graph: bool | None = None,
    progress: Progress | None = None,
) -> NDArray[Any]:
    """Segment one image.

    The image is cut into overlapping tiles, which give the same result as the image as a whole. For
    a 'valid' network it is mirrored at its borders; a 'same' network pads it with zeros, as in
    training, and mirrors its bottom and right up to a multiple of 2^(levels - 1).

    Args:
        model: the network, on any device; runs in evaluation mode and keeps its own. Or several,
            such as those of a cross-validation, for their mean probability; they may differ in
            widths, normalisation, dropout and variant.
        image: [C, H, W] or [H, W] floating point, standardised as in training; from 1x1 up.
        tile: height and width of an input tile in pixels, one number or two; any size that fits.
            None for the one that needs the least work, at most about 1024.
        batch: tiles that go through the network at once.
        output: "probability" or "label".
        autocast: dtype for ``torch.autocast``; None for the network's own.
        tta: test-time augmentation, the mean probability over the eight orientations of each tile;
            takes eight times as long. Tiles turn where they lie, so that tiled and whole results
            stay equal; a turned image gives the turned result where its pooling grid is turned
            onto itself, as that of any size that fits the network is.
        cuda_graph: record each network's kernels for each size of a batch and launch them together,
            on a GPU; gains where tiles are many and small. None for sizes that come often.
        progress: called with the number of tiles done and of all tiles.
    Returns: softmax probabilities [K, H, W] float32, or the most probable class [H, W] uint8
        (uint16 for more than 256 classes). A network of one class, or with a sigmoid, gives each
        class a probability of its own; the label of one class is 1 where that is above 0.5.
    Raises: ValueError for another number of channels, no pixels, NaN or infinity, a tile that does
        not fit (with the nearest sizes that do), batch < 1, ``cuda_graph`` without a GPU, and for
        no network or, naming what differs, several that do not fit together; TypeError for an
        image of integers.
    Source: Ronneberger et al. 2015, figure 2.
    """
    models = networks(model)
    first, page = models[0], _image(image)
    _check(first, page.shape, "image", batch, cuda_graph)
    if output not in get_args(Output):
        raise ValueError(f"predict: output must be probability or label, got {output!r}")
    if not np.isfinite(page).all():
        raise ValueError("predict: image must be finite, got NaN or infinity")
    plan = _plan(first, page.shape, tile)
    leading = (first.n_classes,) if output == "probability" else ()
    result = np.empty((*leading, *page.shape[1:]), _dtype(first, output))
    advance = _counter(progress, _tiles(plan))
    with running(models, output, autocast, tta, cuda_graph) as run:
        _fill(run, page, result, plan, batch=batch, advance=advance)
    return result


def predict_pages(
    model: UNet | Sequence[UNet],
    source: "PageSource",
    path: str | Path,
    *,
    output: PageOutput = "probability",
    tile: Tile = None,
    batch: int = 1,
    autocast: torch.dtype | None = None,
    tta: bool = False,
    cuda_graph: bool | None = None,
    instances: Callable[[NDArray[np.float32]], NDArray[np.integer[Any]]] | None = None,
    overlay: str | Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Segment the pages of a file into a TIFF file, without holding a page in memory.

    Processes that ``distributed.joined`` has joined deal out the pages.

    Each page is standardised by its own statistics. Pages of one size become one stack; pages of
    several sizes become one series each, in order. The file is not compressed, so that it can be
    mapped, and above 4 GB it is a BigTIFF. It appears when it is complete.

    Args:
        model: as for ``predict``.
        source: pages, as ``open_pages`` gives them.
        path: the file to write, ending in .tif or .tiff.
        output: "probability": float32, for up to two classes that of the foreground, [N, H, W],
            else [N, K, H, W]; "label": the most probable class, [N, H, W] uint8 (uint16 for
            more than 256 classes); or "instances": the ids of cells, 0 for background, [N, H, W]
            uint16, or uint32 where a page has more than 65535. These hold a page in memory.
        tile: as for ``predict``.
        batch: as for ``predict``.
        autocast: as for ``predict``.
        tta: as for ``predict``.
        cuda_graph: as for ``predict``.
        instances: makes the ids [H, W] of a page of its probabilities, [H, W] of the foreground for
            up to two classes, else [K, H, W]; by default ``metrics.instances`` by watershed.
        overlay: a .png file for a source of one page, else a folder that gets a picture of each
            page with its segmentation, "0000.png" on; long sides are thinned out to 2048 pixels.
        progress: called with the number of tiles done and of all tiles of all pages.
    Raises: ValueError, naming the page, for another number of channels or NaN; and for a tile or
        networks that do not fit, a path or overlay that cannot be, a disk without the room;
        OSError, naming the file, if the disk refuses.
    """
    # only files need more than torch
    from . import distributed, results
    from .data import page_statistics
    from .metrics import instances as watershed_instances

    if output not in get_args(PageOutput):
        raise ValueError(f"predict: output must be one of {get_args(PageOutput)}, got {output!r}")
    models = networks(model)
    first = models[0]
    path = Path(path)
    shapes = [source.shape(i) for i in range(len(source))]
    for i, shape in enumerate(shapes):
        _check(first, shape, source.name(i), batch, cuda_graph)
        if source.file(i).resolve() == path.resolve():
            raise ValueError(f"predict: {path} is an input, give another name for the output")
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"predict: the output must end in .tif or .tiff, got {path}")
    if output == "instances" and first.n_classes > 1 and first.activation is not None:
        raise ValueError(
            "predict: instances need classes that exclude each other, got a network with a "
            f"{first.activation} for each of {first.n_classes}"
        )
    pictures = results.pictures(overlay, len(shapes))
    plans = [_plan(first, shape, tile) for shape in shapes]
    mine = range(distributed.rank(), len(shapes), distributed.count())
    advance = _counter(progress, sum(_tiles(plans[i]) for i in mine))
    planes = (first.n_classes,) if output != "label" and first.n_classes > 2 else ()
    wanted = "label" if output == "label" else "probability" if planes else "foreground"
    tell_apart = instances or partial(watershed_instances, method="watershed")

    def fill(i: int, target: NDArray[Any]) -> None:
        page = source.page(i)
        _fill(
            run,
            page,
            target,
            plans[i],
            statistics=page_statistics(page, name=source.name(i)),
            batch=batch,
            advance=advance,
        )

    def segment(i: int) -> int:
        """Write page ``i``; its highest id comes back."""
        target, top = pages.page(i), 0
        if output == "instances":
            p = np.empty((*planes, *shapes[i][1:]), np.float32)
            fill(i, p)
            target[:] = ids = tell_apart(p)
            top = int(ids.max())
        else:
            fill(i, target)
        if (picture := pictures[i]) is not None:
            results.draw(picture, source.page(i), target, output)
        return top

    leading = () if output == "instances" else planes
    dtype = np.uint32 if output == "instances" else _dtype(first, output)
    with ExitStack() as stack:
        run = stack.enter_context(running(models, wanted, autocast, tta, cuda_graph))

        def create() -> results.TiffPages:
            sizes = [(*leading, *shape[1:]) for shape in shapes]
            with _naming(path):
                return results.create(stack.enter_context(replacing(path)), sizes, dtype)

        pages = distributed.from_first(create)
        top = max(distributed.dealt(segment, len(shapes)))
        if output == "instances" and top <= np.iinfo(np.uint16).max and distributed.rank() == 0:
            with _naming(path):
                results.narrow(pages, np.uint16)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that is written, not the temporary one, where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error


def _fill(
    run: Run,
    page: "Page",
    target: NDArray[Any],
    plan: Plan,
    *,
    statistics: tuple[NDArray[Any], NDArray[Any]] | None = None,
    batch: int,
    advance: Callable[[int], None],
) -> None:
    """Predict ``page`` [C, H, W] into ``target`` [..., H, W], a batch of windows at a time."""
    windows = product(*(axis.spans for axis in plan))
    while some := list(islice(windows, batch)):
        tiles = np.stack([_read(page, window, plan, statistics) for window in some])
        for value, (rows, columns) in zip(run(tiles), some, strict=True):
            target[..., rows.first : rows.last, columns.first : columns.last] = value[
                ..., _given(rows), _given(columns)
            ]
        advance(len(some))


def _read(
    page: "Page",
    window: Sequence[Span],
    plan: Plan,
    statistics: tuple[NDArray[Any], NDArray[Any]] | None,
) -> NDArray[np.float32]:
    """One window of ``page``, mirrored where it leaves the page and standardised."""
    rows, columns = (
        mirror(torch.arange(span.start, span.start + axis.length), size).numpy()
        for span, axis, size in zip(window, plan, page.shape[1:], strict=True)
    )
    top, left = rows.min(), columns.min()
    block = np.asarray(page[:, top : rows.max() + 1, left : columns.max() + 1])
    if statistics is not None:
        mean, std = (values[:, None, None] for values in statistics)
        block = (block - mean) / np.where(std > 0, std, 1)
    block = block.astype(np.float32, copy=False)
    # one axis after the other is 2.5 times as fast as both at once
    return block.take(rows - top, 1).take(columns - left, 2)


def _given(span: Span) -> slice:
    """The part of the network's output that a window gives."""
    return slice(span.offset, span.offset + span.last - span.first)


def _dtype(model: UNet, output: str) -> type[np.generic]:
    if output == "probability":
        return np.float32
    return np.uint8 if model.n_classes <= 256 else np.uint16


def _plan(model: UNet, shape: Sequence[int], tile: Tile) -> Plan:
    height, width = tile if isinstance(tile, tuple) else (tile, tile)
    return plan_axis(model, shape[1], height), plan_axis(model, shape[2], width)


def _tiles(plan: Plan) -> int:
    return len(plan[0].spans) * len(plan[1].spans)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that adds up tiles and reports their number."""
    done = 0

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        if progress is not None:
            progress(done, total)

    return advance


def _image(image: object) -> NDArray[np.float32]:
    """``image`` as [C, H, W] float32."""
    if isinstance(image, Tensor):
        if not image.is_floating_point():
            raise TypeError(f"predict: image must be floating point, got {image.dtype}")
        image = image.detach().float().cpu().numpy()
    array = np.asarray(image)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"predict: image must be floating point, got {array.dtype}")
    if array.ndim not in (2, 3):
        raise ValueError(f"predict: image must be [C, H, W] or [H, W], got {list(array.shape)}")
    return array.astype(np.float32, copy=False)[(None,) * (3 - array.ndim)]


def _check(
    model: UNet, shape: Sequence[int], name: str, batch: int, cuda_graph: bool | None
) -> None:
    if shape[0] != model.in_channels:
        raise ValueError(
            f"predict: {name} must have {model.in_channels} channels as the network takes, "
            f"got {shape[0]}"
        )
    if 0 in shape:
        raise ValueError(f"predict: {name} must have pixels, got {list(shape)}")
    if batch < 1:
        raise ValueError(f"predict: batch must be >= 1, got {batch}")
    if cuda_graph and (why_not := graphs.unsupported(next(model.parameters()).device)):
        raise ValueError(f"predict: cuda_graph takes {why_not}")
