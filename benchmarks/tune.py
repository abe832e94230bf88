"""``fastunet tune``: which kernel is fastest for each convolution of a network, on this GPU.

Every candidate first computes what the library computes, on inputs with a NaN in them; one that is
wrong, or loses the NaN, is not timed. The winners are kept in a file that later runs read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fastunet.devices import PRECISIONS
from fastunet.files import replacing
from fastunet.ops.conv_relu import tiles
from fastunet.ops.conv_relu.tiles import Problem, Tile
from fastunet.unet import PAPER_WIDTHS

from .cases import noise
from .checks import TF32_EPS
from .figure import arrows
from .timing import QUICK, Clock, interleave, summary

# of the library's time: what a kernel must gain to be taken
WORTH = 0.97


@dataclass(frozen=True)
class Measurement:
    """How long one kernel took for one convolution, or why it was not timed."""

    tile: Tile | None
    ms: float | None
    refused: str = ""


def tune(
    device: torch.device,
    *,
    dtypes: Sequence[str],
    size: int,
    batch: int,
    widths: tuple[int, ...] = PAPER_WIDTHS,
    console: Console,
) -> Path:
    """Measure every convolution of the network, forward and backward, and keep the winners.

    Args:
        device: a GPU.
        dtypes: names in ``fastunet.devices.PRECISIONS``.
        size: height and width of the images in pixels, which must fit the network.
        batch: images at once.
        widths: channels of the network's levels.
        console: where the table goes.
    Returns: the cache file.
    """
    path = tiles.cache_path(device)
    choices = tiles.read(path) if path.exists() else {}
    for name in dtypes:
        dtype = PRECISIONS[name] or torch.float32
        for problem in problems(size, batch, dtype, widths):
            if problem.key in choices:
                continue
            measured = measure(problem, device)
            best = fastest(measured)
            choices[problem.key] = best.tile
            console.print(
                f"{problem.key}: {title(best.tile)}, {best.ms:.3g} ms"
                f" (library {measured[0].ms:.3g} ms)",
                highlight=False,
            )
            for one in measured:
                found = f"refused: {one.refused}" if one.refused else f"{one.ms:.3g} ms"
                console.print(f"    {title(one.tile)}: {found}", highlight=False)
            # what is found is kept, whatever interrupts the rest
            with replacing(path) as temporary:
                temporary.write_text(tiles.text(choices), encoding="utf-8")
    return path


def problems(
    size: int, batch: int, dtype: torch.dtype, widths: tuple[int, ...] = PAPER_WIDTHS
) -> Iterator[Problem]:
    """The convolutions of the unpadded network, forward and backward."""
    for number, arrow in enumerate(a for a in arrows(size, widths) if a.kind == "conv"):
        c_all, out = arrow.c_skip + arrow.c_in, arrow.size - 2
        layer = (batch, arrow.c_skip, arrow.c_in, arrow.c_out, out, out)
        yield Problem("forward", dtype, *layer, arrow.pool)
        if c_all > 1:
            turned = (batch, arrow.c_skip, arrow.c_out, c_all, arrow.size, arrow.size)
            # the second of a pair reads what a ReLU made
            yield Problem("data gradient", dtype, *turned, masked=number % 2 == 1)
        yield Problem("weight gradient", dtype, *layer)


def measure(problem: Problem, device: torch.device) -> list[Measurement]:
    """Time the library, which comes first, and each candidate for ``problem``."""
    run = _runner(problem, device)
    candidates: list[Tile | None] = [None, *tiles.candidates(problem)]
    if problem.kind == "forward" and device.type == "cuda":
        candidates.append(tiles.LIBRARY_FUSED)
    want = run(None)
    measured: dict[Tile | None, Measurement] = {}
    admitted: list[Tile | None] = []
    for tile in candidates:
        refused = _wrong(run, tile, want)
        measured[tile] = Measurement(tile, None, refused)
        if not refused:
            admitted.append(tile)
    clock = Clock(device)
    calls = [lambda tile=tile: run(tile) for tile in admitted]
    for tile, samples in zip(admitted, interleave(calls, [clock] * len(calls), QUICK), strict=True):
        measured[tile] = Measurement(tile, summary(samples)[0])
    return list(measured.values())


def fastest(measured: list[Measurement]) -> Measurement:
    """The winner; the library, the first, unless another is clearly faster."""
    library, *others = measured
    assert library.ms is not None
    timed = [one for one in others if one.ms is not None]
    best = min(timed, key=lambda one: one.ms or 0.0, default=library)
    return best if best.ms is not None and best.ms < WORTH * library.ms else library


def title(tile: Tile | None) -> str:
    """A kernel for the table."""
    if tile is None:
        return "library"
    if tile.kernel == "cudnn":
        return "library with bias and ReLU"
    block = f"{tile.block_n}x{tile.block_h}x{tile.block_w}x{tile.block_k}"
    return f"{tile.kernel} {block}, {tile.warps} warps, {tile.stages} stages"


def _runner(p: Problem, device: torch.device) -> Callable[[Tile | None], tuple[Tensor, ...]]:
    """Computes the unpadded convolution ``p`` by a given kernel."""
    from fastunet.ops.conv_relu import gpu

    turned = p.kind == "data gradient"
    height, width = (n if turned else n + 2 for n in (p.height, p.width))
    c_out, c_in = (p.c, p.c_out - p.c_skip) if turned else (p.c_out, p.c)

    def images(channels: int, height: int, width: int, seed: int) -> Tensor:
        drawn = noise((p.b, channels, height, width), device, p.dtype, seed=seed)
        return drawn.contiguous(memory_format=torch.channels_last)

    x = images(c_in, height, width, 0)
    skip = images(p.c_skip, height, width, 1) if p.c_skip else None
    weight = noise((c_out, p.c_skip + c_in, 3, 3), device, p.dtype, seed=2)
    weight = (weight * (2 / (9 * weight.shape[1])) ** 0.5).contiguous(
        memory_format=torch.channels_last
    )
    bias = noise((c_out,), device, p.dtype, seed=3)
    masked = images(c_out, height - 2, width - 2, 4)
    if p.kind == "forward":
        x[0, 0, height // 2, width // 2] = float("nan")
        return lambda tile: gpu.forward(x, weight, bias, 0, skip, p.pool, tile)
    if turned:
        masked[0, 0, height // 2, width // 2] = float("nan")
        mask, needed = x if p.masked else None, [True, skip is not None]
        return lambda tile: gpu.data_gradients(masked, x, weight, skip, 0, mask, needed, tile)
    return lambda tile: (gpu.weight_gradients(masked, x, weight, skip, 0, tile),)


def _wrong(
    run: Callable[[Tile | None], tuple[Tensor, ...]], tile: Tile | None, want: tuple[Tensor, ...]
) -> str:
    """Why a kernel may not be timed, or ""."""
    try:
        got = run(tile)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for result, expected in zip(got, want, strict=True):
        if not torch.equal(result.isnan(), expected.isnan()):
            return "a NaN is lost"
        right = expected.nan_to_num().float()
        off = float((result.nan_to_num().float() - right).abs().sum())
        # half of the digits, as of the other contenders of a benchmark; float32 is taken as TF32
        eps = max(torch.finfo(expected.dtype).eps, TF32_EPS)
        allowed = float(eps**0.5 * right.abs().sum())
        if not off <= allowed:
            return f"off by {off / max(allowed, 1e-30):.2g} times what is allowed"
    return ""
