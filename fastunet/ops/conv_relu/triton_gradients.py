"""The gradients of ``conv_relu`` on GPUs.

    m = [y > 0] (grad_y + grad_pooled at its block's maximum)    one pass, and the sums for the bias
    grad_x = the convolution of m with the turned weights        the forward kernel
    grad_W[o, r, s, k] = sum over pixels of m[o, p] x[k, p + (r, s) - padding]

The last is a matrix product over pixels. They are split among programs, each of which writes a
partial sum, and the partial sums are added in order: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import At, Launch, Launcher
from .tiles import Tile
from .triton_kernels import block_pixels, blocks_of, convolve, index_type, tiles_of


@triton.jit
def _mask_kernel(
    grad_y_ptr, grad_pooled_ptr, y_ptr, masked_ptr, sums_ptr,
    batch, height, width, channels,
    grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    pooled_stride_b, pooled_stride_c, pooled_stride_h, pooled_stride_w,
    y_stride_b, y_stride_c, y_stride_h, y_stride_w,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):
    """m for BLOCK_C channels of BLOCK_P pixels, counted in 2x2 blocks, and its sum over them.

    Elements moved, of y's number: 3 (grad_y, y, m), and a quarter for grad_pooled.
    """
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :].to(tl.int64)
    known = channel < channels
    program = tl.program_id(0).to(INDEX)
    image, row, column, inside = block_pixels(batch, height, width, BLOCK_P, program)
    image, row, column = image.to(tl.int64), row.to(tl.int64), column.to(tl.int64)
    inside = inside[:, None] & known
    at = image * y_stride_b + row * y_stride_h + column * y_stride_w
    y = tl.load(y_ptr + at[:, None] + channel * y_stride_c, mask=inside, other=0.0)
    at = image * grad_stride_b + row * grad_stride_h + column * grad_stride_w
    grad = tl.load(grad_y_ptr + at[:, None] + channel * grad_stride_c, mask=inside, other=0.0)
    if grad_pooled_ptr is not None:
        block = program * (BLOCK_P // 4) + tl.arange(0, BLOCK_P // 4)
        block_image, block_row, block_column, whole = blocks_of(batch, height, width, block)
        at = (
            block_image.to(tl.int64) * pooled_stride_b
            + block_row.to(tl.int64) * pooled_stride_h
            + block_column.to(tl.int64) * pooled_stride_w
        )
        at = at[:, None] + channel * pooled_stride_c
        pooled = tl.load(grad_pooled_ptr + at, mask=whole[:, None] & known, other=0.0)
        values = y.reshape(BLOCK_P // 4, 4, BLOCK_C)
        number = tl.arange(0, 4)[None, :, None]
        # the first maximum in the order of rows, as PyTorch's pooling takes
        is_largest = values == tl.max(values, 1, keep_dims=True)
        winner = tl.min(tl.where(is_largest, number, 4), 1, keep_dims=True)
        added = tl.where(number == winner, pooled[:, None, :].to(tl.float32), 0.0)
        grad = (grad.to(tl.float32) + added.reshape(BLOCK_P, BLOCK_C)).to(y.dtype)
    # as PyTorch: a NaN is not <= 0
    masked = tl.where(y <= 0, 0.0, grad).to(y.dtype)
    at = ((image * height + row) * width + column) * channels
    tl.store(masked_ptr + at[:, None] + channel, masked, mask=inside)
    if sums_ptr is not None:
        total = tl.sum(tl.where(inside, masked, 0.0).to(tl.float32), 0, keep_dims=True)
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * channels + channel, total, mask=known)


@triton.jit
def _grad_weight_tma_kernel(
    masked_desc, source_desc, partial_ptr,
    tiles_o, height, chunks, c_out, first, c_all,
    C: tl.constexpr, PADDING: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The three taps of a row, BLOCK_O x BLOCK_C channels each, summed over STEPS runs of pixels.

    A run is BLOCK_W pixels of a row: m is read once and x three times from L2.
    """
    o = tl.program_id(0) % tiles_o * BLOCK_O
    tap_row = tl.program_id(0) // tiles_o % 3
    c = tl.program_id(0) // tiles_o // 3 * BLOCK_C
    split = tl.program_id(1)
    left = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    middle = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    right = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    # runs past the last image read zeros
    for step in range(STEPS):
        run = split * STEPS + step
        column = run % chunks * BLOCK_W
        row = run // chunks % height
        image = run // chunks // height
        masked = masked_desc.load([image, row, column, o]).reshape(BLOCK_W, BLOCK_O).T
        i, j = row + tap_row - PADDING, column - PADDING
        left = tl.dot(masked, source_desc.load([image, i, j, c]).reshape(BLOCK_W, BLOCK_C), left)
        middle = tl.dot(
            masked, source_desc.load([image, i, j + 1, c]).reshape(BLOCK_W, BLOCK_C), middle
        )
        right = tl.dot(
            masked, source_desc.load([image, i, j + 2, c]).reshape(BLOCK_W, BLOCK_C), right
        )
    o = o + tl.arange(0, BLOCK_O)[:, None]
    c = c + tl.arange(0, BLOCK_C)[None, :]
    at = ((split * c_out + o).to(tl.int64) * 9 + 3 * tap_row) * c_all + first + c
    inside = (o < c_out) & (c < C)
    tl.store(partial_ptr + at, left, mask=inside)
    tl.store(partial_ptr + at + c_all, middle, mask=inside)
    tl.store(partial_ptr + at + 2 * c_all, right, mask=inside)


@triton.jit
def _grad_weight_pointer_kernel(
    masked_ptr, source_ptr, partial_ptr,
    batch, in_height, in_width, height, width, tiles_o, c_out, first, c_all, steps,
    source_stride_b, source_stride_c, source_stride_h, source_stride_w,
    C: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """BLOCK_O channels of m times BLOCK_C of the 9 C shifted channels of x, over steps runs of pixels.

    m and x are read once for each tile of the other.
    """
    o = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.program_id(0) // tiles_o * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    tap, c = column // C, column % C
    acc = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for step in range(steps):
        pixel = (split * steps + step).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
        image, at = pixel // (height * width), pixel % (height * width)
        inside = (image < batch)[:, None]
        masked = tl.load(
            masked_ptr + pixel.to(tl.int64)[:, None] * c_out + o[None, :],
            mask=inside & (o < c_out)[None, :],
            other=0.0,
        )
        i = (at // width)[:, None] + (tap // 3)[None, :] - PADDING
        j = (at % width)[:, None] + (tap % 3)[None, :] - PADDING
        there = (
            inside
            & (column < 9 * C)[None, :]
            & (i >= 0)
            & (i < in_height)
            & (j >= 0)
            & (j < in_width)
        )
        source = tl.load(
            source_ptr
            + image.to(tl.int64)[:, None] * source_stride_b
            + (i * source_stride_h + j * source_stride_w + c[None, :].to(INDEX) * source_stride_c),
            mask=there,
            other=0.0,
        )
        acc = tl.dot(masked.T, source, acc, input_precision=PRECISION)
    at = ((split * c_out + o[:, None]).to(tl.int64) * 9 + tap[None, :]) * c_all + first + c[None, :]
    tl.store(partial_ptr + at, acc, mask=(o < c_out)[:, None] & (column < 9 * C)[None, :])


@triton.jit
def _sum_kernel(
    images_ptr, sums_ptr, pixels, channels,
    STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The sums of BLOCK_C channels over STEPS blocks of pixels; each element is read once."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = (channel < channels)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(STEPS):
        pixel = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        at = pixel[:, None] * channels + channel[None, :]
        total += tl.load(images_ptr + at, mask=(pixel < pixels)[:, None] & known, other=0.0).to(tl.float32)
    sums = tl.sum(total, 0, keep_dims=True)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * channels + channel[None, :], sums, mask=known)


_mask = Launcher(_mask_kernel)
_sum = Launcher(_sum_kernel)
_grad_weight_tma = Launcher(_grad_weight_tma_kernel)
_grad_weight_pointer = Launcher(_grad_weight_pointer_kernel)
# elements that a program of a pass over images has in registers, and how often
BLOCK, SUM_STEPS = 4096, 8


def mask_gradient(
    grad_y: Tensor, grad_pooled: Tensor | None, y: Tensor, need_sum: bool
) -> tuple[Tensor, Tensor]:
    """The gradient before the ReLU, in channels_last, and with ``need_sum`` that of the bias."""
    b, channels, height, width = y.shape
    masked = torch.empty_like(y, memory_format=torch.channels_last)
    block_p, block_c = _block(channels)
    programs = triton.cdiv(4 * b * triton.cdiv(height, 2) * triton.cdiv(width, 2), block_p)
    sums = y.new_empty((programs, channels), dtype=torch.float32) if need_sum else None

    def prepare() -> Launch:
        arguments = [
            At(0), None if grad_pooled is None else At(1), At(2), At(3), None if sums is None else At(4),
            b, height, width, channels,
            *grad_y.stride(), *(grad_y if grad_pooled is None else grad_pooled).stride(), *y.stride(),
        ]  # fmt: skip
        options = {"BLOCK_P": block_p, "BLOCK_C": block_c, "INDEX": index_type(grad_y, y), "num_warps": 4}
        return Launch((programs, triton.cdiv(channels, block_c)), arguments, options)

    _mask((grad_y, grad_pooled, y, masked, sums), (), prepare)
    return masked, y.new_empty(0) if sums is None else sums.sum(0).to(y.dtype)


def sum_of_pixels(images: Tensor) -> Tensor:
    """[C] of [B, C, H, W] in channels_last, in its dtype: the gradient of a bias."""
    b, channels, height, width = images.shape
    pixels = b * height * width
    block_p, block_c = _block(channels)
    programs = triton.cdiv(pixels, block_p * SUM_STEPS)
    sums = images.new_empty((programs, channels), dtype=torch.float32)

    def prepare() -> Launch:
        options = {"STEPS": SUM_STEPS, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4}
        grid = (programs, triton.cdiv(channels, block_c))
        return Launch(grid, [At(0), At(1), pixels, channels], options)

    _sum((images, sums), (), prepare)
    return sums.sum(0).to(images.dtype)


def _block(channels: int) -> tuple[int, int]:
    """Pixels and channels of a program."""
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    return BLOCK // block_c, block_c


def data_gradient(
    masked: Tensor, weight: Tensor, padding: int, grad: Tensor, tile: Tile,
    mask: Tensor | None = None,
) -> None:
    """Write the gradient of a source, whose weights are [C_out, C, 3, 3], into ``grad``.

    Where ``mask`` is not positive it becomes 0: the source itself, if a ReLU made it.
    """
    turned = weight.flip((2, 3)).transpose(0, 1)
    turned = turned.contiguous(memory_format=torch.channels_last)
    convolve([masked], turned, None, 2 - padding, grad, tile, relu=False, mask=mask)


def weight_gradient(
    masked: Tensor, sources: list[Tensor], padding: int, tile: Tile, multiprocessors: int
) -> Tensor:
    """The gradient of the weights, [C_out, C_all, 3, 3] in channels_last as ``masked`` is."""
    b, c_out, height, width = masked.shape
    tma = tile.kernel == "tma"
    tiles_o = triton.cdiv(c_out, tile.block_n)
    tiles = [
        3 * triton.cdiv(c, tile.block_k) if tma else triton.cdiv(9 * c, tile.block_k)
        for c in (source.shape[1] for source in sources)
    ]
    chunks = triton.cdiv(width, tile.block_w)
    runs = b * height * chunks if tma else triton.cdiv(b * height * width, tile.pixels)
    # two programs for each multiprocessor, of at least eight runs
    splits = min(triton.cdiv(2 * multiprocessors, tiles_o * sum(tiles)), triton.cdiv(runs, 8))
    steps = triton.cdiv(runs, splits)
    c_all = sum(source.shape[1] for source in sources)
    partial = masked.new_empty((splits, c_out, 9, c_all), dtype=torch.float32)
    first = 0
    for source, columns in zip(sources, tiles, strict=True):
        options = {
            "C": source.shape[1], "PADDING": padding, "BLOCK_O": tile.block_n, "BLOCK_C": tile.block_k,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        grid, key = (tiles_o * columns, splits), (first, steps, padding, tile)
        if tma:
            pixels = [1, 1, tile.block_w]
            launch = Launch(grid, [
                tiles_of(0, [*pixels, tile.block_n]), tiles_of(1, [*pixels, tile.block_k]), At(2),
                tiles_o, height, chunks, c_out, first, c_all,
            ], {**options, "STEPS": steps, "BLOCK_W": tile.block_w})  # fmt: skip
            _launch(_grad_weight_tma, (masked, source, partial), key, launch)
        else:
            launch = Launch(grid, [
                At(0), At(1), At(2), b, *source.shape[2:], height, width, tiles_o, c_out, first, c_all,
                steps, *source.stride(),
            ], {**options, "BLOCK_P": tile.pixels, "PRECISION": "tf32", "INDEX": index_type(masked, source)})  # fmt: skip
            _launch(_grad_weight_pointer, (masked, source, partial), key, launch)
        first += source.shape[1]
    grad = partial[0] if splits == 1 else partial.sum(0)
    return grad.to(masked.dtype).reshape(c_out, 3, 3, c_all).permute(0, 3, 1, 2)


def _launch(launcher: Launcher, tensors: tuple[Tensor, ...], key: tuple[object, ...], launch: Launch) -> None:
    launcher(tensors, key, lambda: launch)
