"""``conv_relu`` on the CPU in float32 by Winograd's F(4x4, 3x3), where it is faster than oneDNN.

    y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A

for each tile of 4x4 outputs, with d the 6x6 inputs that it depends on and g the 3x3 weights: 36
products a channel and tile instead of 144. docs/maths/winograd.md derives the matrices, the
gradients, which are the same sums, and the error.

Weights are transformed in each call: nothing derived from them is kept, so nothing can be stale.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import EXTENSION_MISSING
from .._library import LIBRARY
from .reference import laid_out_like

# images come and go as [B, C, H, W] in channels_last, results of the operators as [B, H, W, C]
LIBRARY.define(
    "winograd_conv_relu(Tensor x, Tensor weight, Tensor? bias, int padding, Tensor? skip, "
    "bool pool) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "winograd_grad_input(Tensor grad, Tensor weight, int padding, Tensor x, Tensor? skip, "
    "bool need_x, bool need_skip, bool relu_made_x) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "winograd_grad_weight(Tensor grad, Tensor x, Tensor? skip, int padding, bool need_bias) "
    "-> (Tensor, Tensor)"
)

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
    """
    before, _switch["on"] = _switch["on"], bool(on)
    return before


class Work(NamedTuple):
    """What one convolution has to do: tiles of its result, multiply-adds by 9, channels."""

    tiles: int
    pixels: int
    inputs: int
    outputs: int


def work(y: Size, weight: Tensor) -> Work:
    """The work of a convolution of result ``y``, or of the gradient of its weights."""
    return Work(_tiles(y), prod(y), weight.shape[1], weight.shape[0])


def work_for_images(x: Size, y: Size, weight: Tensor) -> Work:
    """The work of the gradient of its input ``x``: tiles of that, but no more multiply-adds."""
    return Work(_tiles(x), prod(y), weight.shape[0], weight.shape[1])


def pays(kind: str, task: Work) -> bool:
    """Whether Winograd is faster than oneDNN at a convolution.

    ``kind`` is "forward", or "images" or "weights" for their gradients. Costs are counted in
    multiply-adds. The products are a quarter of the convolution's; besides there are, as measured
    (docs/maths/winograd.md), a channel of a tile that is transformed, much of which is waiting for
    memory, a weight, and a call, which starts threads several times.
    """
    tiles, pixels, inputs, outputs = task
    weights = inputs * outputs
    channels: float = inputs + outputs
    if kind == "weights":
        # both operands are transformed anew for each block of the other one's channels
        channels *= (-(-inputs // MOST_OF_BLOCK) + -(-outputs // MOST_OF_BLOCK)) / 2
    transforms = 900 * tiles * channels + PER_WEIGHT[kind] * weights + 1_000_000
    return 36 * tiles * weights + transforms < 9 * pixels * weights


def why_not_here() -> str | None:
    """Why Winograd serves nothing in this process as it is set up, or None."""
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if not _switch["on"]:
        return "it is switched off"
    if not _exact():
        return "less than float32 is allowed"
    return None


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why Winograd cannot take a convolution of ``x``, or its gradients; or None."""
    if x.dtype != torch.float32:
        return f"{x.dtype} is not float32"
    if max(weight.shape[:2]) > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS} channels"
    return why_not_here()


def serves(x: Tensor, weight: Tensor, padding: int) -> bool:
    """Whether Winograd can take a convolution of ``x``, and is faster."""
    if unsupported(x, weight):
        return False
    height, width = (n - 2 + 2 * padding for n in x.shape[2:])
    return pays("forward", work((x.shape[0], height, width), weight))


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    skip: Tensor | None,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    """Convolution, bias and ReLU, and with ``pool`` the pooled copy."""
    x, skip = _channels_last(x), None if skip is None else _channels_last(skip)
    y, pooled = torch.ops.fastunet.winograd_conv_relu(x, weight, bias, padding, skip, pool)
    return _images(y), _images(pooled) if pool else pooled


def gradients(
    masked: Tensor,
    x: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    padding: int,
    needed: list[bool],
    relu_made_x: bool,
) -> tuple[list[Tensor], list[bool]]:
    """Gradients of x, weight, bias and skip where Winograd is faster, and which are still needed.

    ``masked`` is the gradient of the convolution; with ``relu_made_x`` that of ``x`` is zero where
    ``x`` is not above zero. What is not needed, and what is left, is empty.
    """
    grad_x = grad_weight = grad_bias = grad_skip = x.new_empty(0)
    need_x, need_weight, need_bias, need_skip = needed
    if not unsupported(x, weight):
        grad = _channels_last(masked)
        y_size, x_size = (t.shape[:1] + t.shape[2:] for t in (grad, x))
        if (need_x or need_skip) and pays("images", work_for_images(x_size, y_size, weight)):
            mask = _channels_last(x) if relu_made_x else x
            grad_x, grad_skip = torch.ops.fastunet.winograd_grad_input(
                grad, weight, padding, mask, skip, need_x, need_skip, relu_made_x
            )
            grad_x = laid_out_like(_images(grad_x), x) if need_x else grad_x
            if need_skip and skip is not None:
                grad_skip = laid_out_like(_images(grad_skip), skip)
            need_x = need_skip = False
        if need_weight and pays("weights", work(y_size, weight)):
            x, skip = _channels_last(x), None if skip is None else _channels_last(skip)
            grad_weight, grad_bias = torch.ops.fastunet.winograd_grad_weight(
                grad, x, skip, padding, need_bias
            )
            grad_weight = laid_out_like(_images(grad_weight), weight)
            need_weight = need_bias = False
    rest = [need_x, need_weight, need_bias, need_skip]
    return [grad_x, grad_weight, grad_bias, grad_skip], rest


def _tiles(size: Size) -> int:
    batch, height, width = size
    return batch * -(-height // TILE) * -(-width // TILE)


def _exact() -> bool:
    """Whether convolutions and matrix products are computed in float32, and not in less."""
    precision = torch._C._get_fp32_precision_getter
    return all(precision("mkldnn", kind) in ("none", "ieee") for kind in ("matmul", "conv"))


def _channels_last(images: Tensor) -> Tensor:
    """``images``, or a copy, with the channels of a pixel next to each other."""
    if images.stride(1) == 1 or images.shape[1] == 1:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _images(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)
