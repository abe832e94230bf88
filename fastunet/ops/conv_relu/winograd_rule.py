"""Which convolutions Winograd's algorithm serves on the CPU: a switch, what it can take, a rule."""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...backends import EXTENSION_MISSING

# a convolution, the gradient of its images, that of its weights
Kind = Literal["forward", "images", "weights"]
# of images: their number, height and width
Size = Sequence[int]

TILE = 4
# multiply-adds that a transformed weight costs as much as; forward turns them around as well
PER_WEIGHT = {"forward": 1700, "images": 1000, "weights": 850}
# channels of the weights' gradient that are one block
MOST_OF_BLOCK = 192
# beyond it a single block of weights or tiles would take more memory than we promise
MOST_CHANNELS = 4096

_switch = {"on": True}


def use_winograd(on: bool) -> bool:
    """Let float32 convolutions on the CPU run by Winograd's algorithm where it is faster, or not.

    It is on to begin with. Results are then off by up to 5e-6 of their largest magnitude, where
    those of the plain convolution are by a few times 1e-7, and a NaN or an infinity reaches all
    outputs of the 4x4 tiles that read it, as NaN. The setting is the process's, for all threads,
    and holds for compiled networks too: it is looked up in each call.

    Args:
        on: whether it may run.
    Returns: whether it could before.
    Raises: TypeError if ``on`` is not a bool.
    """
    if not isinstance(on, bool):
        raise TypeError(f"use_winograd: on must be True or False, got {on!r}")
    before, _switch["on"] = _switch["on"], on
    return before


def why_not_here() -> str | None:
    """Why Winograd serves nothing in this process as it is set up, or None."""
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if not _switch["on"]:
        return "it is switched off"
    if not _float32_is_kept():
        return "less than float32 is allowed"
    return None


def unsupported(kind: Kind, x: Tensor, weight: Tensor, padding: int) -> str | None:
    """Why Winograd does not serve a convolution of ``x``, or a gradient of it; or None."""
    if x.dtype != torch.float32:
        return f"{x.dtype} is not float32"
    if max(weight.shape[:2]) > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} channels"
    if not pays(kind, work(kind, (x.shape[0], *x.shape[2:]), weight, padding)):
        return "oneDNN is faster"
    return why_not_here()


class Work(NamedTuple):
    """What there is to do: tiles, pixels of the convolution, channels that come in and go out."""

    tiles: int
    pixels: int
    inputs: int
    outputs: int


def work(kind: Kind, x: Size, weight: Tensor, padding: int) -> Work:
    """The work of a convolution of images ``x``, or of a gradient of it."""
    y = (x[0], *(n - 2 + 2 * padding for n in x[1:]))
    outputs, inputs = weight.shape[:2]
    if kind == "images":
        return Work(_tiles(x), prod(y), outputs, inputs)
    return Work(_tiles(y), prod(y), inputs, outputs)


def pays(kind: Kind, task: Work) -> bool:
    """Whether Winograd is faster than oneDNN.

    Costs are counted in multiply-adds. The products are a quarter of the convolution's; besides
    there are, as measured (docs/maths/winograd.md), a channel of a tile that is transformed, much
    of which is waiting for memory, a weight, and a call, which starts threads several times.
    """
    tiles, pixels, inputs, outputs = task
    weights = inputs * outputs
    channels: float = inputs + outputs
    if kind == "weights":
        # both operands are transformed anew for each block of the other one's channels
        channels *= (-(-inputs // MOST_OF_BLOCK) + -(-outputs // MOST_OF_BLOCK)) / 2
    transforms = 900 * tiles * channels + PER_WEIGHT[kind] * weights + 1_000_000
    return 36 * tiles * weights + transforms < 9 * pixels * weights


def _tiles(size: Size) -> int:
    batch, height, width = size
    return batch * -(-height // TILE) * -(-width // TILE)


def _float32_is_kept() -> bool:
    """Whether convolutions and matrix products are computed in float32, and not in less."""
    precision = torch._C._get_fp32_precision_getter
    return all(precision("mkldnn", kind) in ("none", "ieee") for kind in ("matmul", "conv"))
