"""Which kernel computes a convolution on a GPU: from a cache of measurements, or by a rule.

The rule was measured on one GPU; nothing is measured or searched when a model runs. ``fastunet
tune`` measures on any other, and writes the cache.
"""

import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["forward", "data gradient", "weight gradient"]

# wgmma and tcgen05, fed from shared memory by tensor descriptors; others have less of it
DESCRIPTOR_MAJORS = (9, 10)
# with fewer input channels the nine taps are one block, and the library pads
FEW_CHANNELS = 8
# up to here the layer's own traffic weighs more than the library's better arithmetic
WIDEST = 128
# of small blocks: how often each multiprocessor takes one, where wider layers gain too
FEW_TURNS = 2
# pixels of a batch from which on a gradient's fused passes pay
MANY_PIXELS = 300_000
# how long a block of twice the pixels takes
LARGE_TURN = 1.86


@dataclass(frozen=True)
class Gpu:
    """A GPU as the choice of a kernel sees it.

    Args:
        capability: compute capability, (9, 0) for Hopper; (0, 0) where it is not NVIDIA's.
        multiprocessors: how many programs run at once, if each fills one.
    """

    capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class Tile:
    """A kernel and the block that one of its programs computes.

    Args:
        kernel: "tma" reads through tensor descriptors, "pointer" through pointers; "cudnn" is
            the library's convolution with bias and ReLU, which has no blocks to choose.
        block_n: output channels; of a weight gradient, rows of it.
        block_h, block_w: pixels; "pointer" takes their product.
        block_k: input channels a step; of a weight gradient, columns of it.
        warps, stages: of Triton, the second how many steps are loaded ahead.
    """

    kernel: Literal["tma", "pointer", "cudnn"]
    block_n: int = 1
    block_h: int = 1
    block_w: int = 1
    block_k: int = 1
    warps: int = 1
    stages: int = 1

    @property
    def pixels(self) -> int:
        """Pixels of a block."""
        return self.block_h * self.block_w


FEW_CHANNEL_TILES: dict[Kind, list[Tile]] = {
    "forward": [
        Tile("pointer", 64, 1, 128, 16, 4, 2),
        Tile("pointer", 64, 1, 64, 16, 4, 2),
        Tile("pointer", 64, 1, 128, 16, 8, 2),
        Tile("pointer", 64, 1, 256, 16, 8, 2),
        Tile("pointer", 64, 1, 64, 16, 8, 2),
    ],
    "weight gradient": [
        Tile("pointer", 64, 1, 128, 16, 4, 3),
        Tile("pointer", 64, 1, 128, 16, 8, 3),
        Tile("pointer", 64, 1, 64, 16, 4, 3),
    ],
}
# the library's convolution with bias and ReLU in one pass, and where its ReLU was seen to keep NaN
LIBRARY_FUSED = Tile("cudnn")
KEEPS_NAN = ((9, 0),)


@dataclass(frozen=True)
class Problem:
    """A convolution as the choice of its kernel sees it.

    Args:
        kind: of the three convolutions of a layer.
        dtype: of images and weights.
        b, c_skip, c, c_out: batch and channels of skip, x and y; of a data gradient, of the skip
            alone, of its own input and of its whole output.
        height, width: of what it writes; of a weight gradient, those of y.
        pool: the pooled copy is written too.
        masked: of a data gradient, it is multiplied by a ReLU's mask.
    """

    kind: Kind
    dtype: torch.dtype
    b: int
    c_skip: int
    c: int
    c_out: int
    height: int
    width: int
    pool: bool = False
    masked: bool = False

    @property
    def key(self) -> str:
        """Its name in the cache."""
        dtype = str(self.dtype).removeprefix("torch.")
        more = " pool" * self.pool + " masked" * self.masked
        return (
            f"{self.kind} {dtype} {self.b}x{self.height}x{self.width} "
            f"{self.c_skip}+{self.c}->{self.c_out}{more}"
        )


def choose(problem: Problem, gpu: Gpu, cached: dict[str, Tile | None]) -> Tile | None:
    """The kernel for ``problem`` on ``gpu``; None is the library's own."""
    if problem.key in cached:
        return cached[problem.key]
    return expected(problem, gpu)


def expected(problem: Problem, gpu: Gpu) -> Tile | None:
    """The kernel that should be fastest where nothing was measured.

    By what was measured on an H200 with the layers of figure 1, docs/tuning-log.md.
    """
    if _has_few_channels(problem):
        return candidates(problem)[0]
    aligned = all(
        n * problem.dtype.itemsize % 16 == 0 for n in (problem.c_skip, problem.c, problem.c_out)
    )
    forward = problem.kind == "forward"
    fuses = forward and aligned and gpu.capability in KEEPS_NAN
    library = LIBRARY_FUSED if fuses else None
    if gpu.capability[0] not in DESCRIPTOR_MAJORS or not aligned:
        return library
    if forward:
        tile, turns = _least_turns(problem, gpu.multiprocessors)
        # what the library would do besides: pool, or concatenate
        fewer_passes = problem.pool or (
            problem.c_skip > 0 and (problem.c_out <= WIDEST or turns <= FEW_TURNS)
        )
        return tile if fewer_passes else library
    pixels = problem.b * problem.height * problem.width
    fewer_passes = problem.masked or problem.c_skip > 0
    if problem.kind == "data gradient" and fewer_passes:
        narrow = problem.c <= WIDEST and problem.c_out <= 2 * WIDEST
        if narrow and pixels >= MANY_PIXELS:
            return _least_turns(problem, gpu.multiprocessors)[0]
    return library


def _least_turns(problem: Problem, multiprocessors: int) -> tuple[Tile, int]:
    """The block whose programs keep the GPU busy for the least time, and how many turns it takes.

    Multiprocessors take a block at a time; one twice as large takes ``LARGE_TURN`` times as long.
    """
    block_k = 128 // problem.dtype.itemsize
    small, large = (_fit(pixels, problem) for pixels in (128, 256))
    # with a skip a gradient has two parts, written one after the other
    narrowest = min(problem.c_skip or problem.c_out, problem.c_out)
    if narrowest <= 64:
        return Tile("tma", 64, *small, block_k, 4, 4), _turns(problem, 64, small, multiprocessors)
    turns = _turns(problem, 128, small, multiprocessors)
    if LARGE_TURN * _turns(problem, 128, large, multiprocessors) < turns:
        return Tile("tma", 128, *large, block_k, 8, 3), turns
    return Tile("tma", 128, *small, block_k, 4, 4), turns


def _turns(problem: Problem, block_n: int, block: tuple[int, int], multiprocessors: int) -> int:
    programs = problem.b * -(-problem.c_out // block_n)
    for size, length in zip((problem.height, problem.width), block, strict=True):
        programs *= -(-size // length)
    return -(-programs // multiprocessors)


def candidates(problem: Problem) -> list[Tile]:
    """What ``fastunet tune`` measures beside the library."""
    if _has_few_channels(problem):
        if problem.dtype == torch.float32:
            # which takes twice the registers
            return [FEW_CHANNEL_TILES[problem.kind][-1]]
        return FEW_CHANNEL_TILES[problem.kind]
    if problem.kind == "weight gradient":
        if problem.dtype == torch.float32:
            # both operands would have to be transposed, which only registers can
            return []
        return [
            Tile("tma", 64, 1, 64, 64, 8, 3),
            Tile("tma", 128, 1, 64, 64, 4, 3),
            Tile("pointer", 64, 1, 64, 64, 4, 3),
        ]
    block_k = 128 // problem.dtype.itemsize
    large, small = (_fit(pixels, problem) for pixels in (256, 128))
    narrow = [
        Tile("tma", 64, *large, block_k, 4, 3),
        Tile("tma", 64, *small, block_k, 4, 4),
        Tile("pointer", 64, 1, 128, 32, 8, 3),
    ]
    if problem.c_out <= 64:
        return narrow
    return [
        Tile("tma", 128, *large, block_k, 8, 3),
        Tile("tma", 128, *small, block_k, 4, 4),
        Tile("tma", 128, *large, block_k, 8, 4),
        Tile("tma", 128, *small, block_k, 8, 4),
        Tile("pointer", 128, 1, 64, 32, 4, 3),
        *narrow,
    ]


def _has_few_channels(problem: Problem) -> bool:
    return problem.kind in FEW_CHANNEL_TILES and problem.c_skip + problem.c < FEW_CHANNELS


def _fit(pixels: int, problem: Problem) -> tuple[int, int]:
    """The block of so many pixels that covers the image with the least beyond it."""

    def covered(block: tuple[int, int]) -> int:
        h, w = block
        return -(-problem.height // h) * h * -(-problem.width // w) * w

    # of those that cover alike, the one with the longest rows
    return min(((pixels // w, w) for w in (32, 16, 8)), key=covered)


def cache_path(device: torch.device) -> Path:
    """Where the measurements of this GPU, torch and Triton are kept."""
    import triton

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastunet")
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return folder / f"{name}_torch-{torch.__version__}_triton-{triton.__version__}.json"


@cache
def cached(device: torch.device) -> dict[str, Tile | None]:
    """What ``fastunet tune`` found on ``device``, by ``Problem.key``; read once a process."""
    if device.type != "cuda":
        return {}
    path = cache_path(device)
    return read(path) if path.exists() else {}


def read(path: Path) -> dict[str, Tile | None]:
    """The choices in a cache file; none, with a warning, where it cannot be read."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        return {
            key: None if tile is None else Tile(**_checked(tile)) for key, tile in entries.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a cache of `fastunet tune` and is ignored: {error!r}; run it again",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def text(choices: dict[str, Tile | None]) -> str:
    """``choices`` as ``read`` takes them."""
    tiles = {key: None if tile is None else asdict(tile) for key, tile in choices.items()}
    return json.dumps({"tiles": tiles}, indent=1)


def _checked(tile: dict[str, Any]) -> dict[str, Any]:
    blocks = [tile[name] for name in ("block_n", "block_h", "block_w", "block_k", "warps")]
    if tile["kernel"] not in ("tma", "pointer", "cudnn") or not all(
        isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in blocks
    ):
        raise ValueError(f"no such tile: {tile}")
    return tile
