"""The up-convolution of 2x2 and stride 2 on Hopper and later, as a product with a matrix.

    acc[p, (tap, o)] = sum over channels c of  x[p, c] W[c, (tap, o)]

In channels_last the weights are that matrix as they lie in memory. Each pixel's four products go
where its 2x2 block of the result is.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._triton import At, Described, Launch, Launcher

BLOCK_P, BLOCK_K = 128, 64


@triton.jit
def _up_conv_fwd_kernel(
    x_desc, weight_desc, bias_ptr, y_ptr,
    pixels, width,
    C: tl.constexpr, C_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """BLOCK_N channels of one tap of BLOCK_P pixels.

    From global memory: x once and weights once, as far as L2 holds them; y is written once.
    """
    # programs that run together share their pixels in L2
    TILES: tl.constexpr = C_OUT // BLOCK_N
    first = tl.program_id(0) % TILES * BLOCK_N
    tap = tl.program_id(0) // TILES % 4
    p = tl.program_id(0) // (4 * TILES) * BLOCK_P
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for k in range(0, C, BLOCK_K):
        acc = tl.dot(x_desc.load([p, k]), weight_desc.load([k, tap * C_OUT + first]), acc)
    channel = first + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    p = p.to(tl.int64) + tl.arange(0, BLOCK_P)
    # rows of all images, one after the other, become two each
    row, column = p // width * 2 + tap // 2, p % width * 2 + tap % 2
    at = (row * 2 * width + column) * C_OUT
    inside = (p < pixels)[:, None]
    tl.store(y_ptr + at[:, None] + channel[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(_up_conv_fwd_kernel)


def up_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the up-convolution of ``x`` into ``y``.

    Args:
        x: [B, C, H, W] in channels_last, C a multiple of 8.
        weight: [C, C_out, 2, 2] in channels_last, C_out a multiple of 64.
        bias: [C_out].
        y: [B, C_out, 2 H, 2 W] in channels_last.
    """
    (b, c, height, width), c_out = x.shape, weight.shape[1]

    def prepare() -> Launch:
        pixels, block_n = b * height * width, 128 if c_out % 128 == 0 else 64
        arguments = [
            Described(0, lambda x: TensorDescriptor(x, [pixels, c], [c, 1], [BLOCK_P, BLOCK_K])),
            Described(
                1,
                lambda weight: TensorDescriptor(
                    weight, [c, 4 * c_out], [4 * c_out, 1], [BLOCK_K, block_n]
                ),
            ),
            None if bias is None else At(2),
            *(At(3), pixels, width),
        ]
        options = {"C": c, "C_OUT": c_out, "BLOCK_P": BLOCK_P, "BLOCK_N": block_n}
        options |= {"BLOCK_K": BLOCK_K, "num_warps": 8 if block_n == 128 else 4, "num_stages": 3}
        grid = (triton.cdiv(pixels, BLOCK_P) * (4 * c_out // block_n),)
        return Launch(grid, arguments, options)

    _launch((x, weight, bias, y), (), prepare)
