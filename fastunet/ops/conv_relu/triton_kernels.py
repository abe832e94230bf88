"""The convolution of ``conv_relu`` on GPUs: an implicit matrix product over shifted pixels.

    acc[o, p] = sum over taps (r, s) and channels k of  W[o, k, r, s] x[p + (r, s) - padding, k]

One kernel reads tiles through tensor descriptors (Hopper and later), which fill with zeros what lies
outside: that is the padding, and with a view of the skip's centre the crop. The other reads through
pointers, for every other GPU, layout and number of channels. Both end with bias, ReLU, the gradient's
mask and the pooled copy, whichever are asked for. docs/maths/conv_relu.md counts their bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._triton import At, Described, Launch, Launcher, is_wide
from .tiles import Tile


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_source(
    acc,
    source_desc, weight_desc,
    image, row, column, first_out, first_in,
    C: tl.constexpr, C_ALL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add one source's nine taps to acc, [BLOCK_N, BLOCK_H * BLOCK_W]."""
    # a constant trip count and operands straight from the descriptors keep the tensor cores fed
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for step in range(9 * BLOCKS):
        tap = step // BLOCKS
        k = step % BLOCKS * BLOCK_K
        pixels = source_desc.load([image, row + tap // 3, column + tap % 3, k])
        # past the last channel come those of the next tap, times the zeros of the pixels
        weights = weight_desc.load([first_out, tap * C_ALL + first_in + k])
        pixels = pixels.reshape(BLOCK_H * BLOCK_W, BLOCK_K)
        acc = tl.dot(weights, pixels.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_relu_fwd_tma_kernel(
    skip_desc, x_desc, weight_desc, bias_ptr, mask_desc, y_desc, pooled_desc,
    tiles_n, tiles_h, tiles_w,
    C_SKIP: tl.constexpr, C: tl.constexpr, C_OUT: tl.constexpr, PADDING: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """BLOCK_N output channels of a tile of BLOCK_H x BLOCK_W pixels of one image.

    From global memory: each source once a tile of channels that does not stay in L2, weights once;
    y and its pooled copy are written once.
    """
    # channels first: programs that run together share their pixels in L2
    program = tl.program_id(0)
    n = program % tiles_n * BLOCK_N
    column = program // tiles_n % tiles_w * BLOCK_W
    row = program // tiles_n // tiles_w % tiles_h * BLOCK_H
    image = program // tiles_n // tiles_w // tiles_h

    acc = tl.zeros((BLOCK_N, BLOCK_H * BLOCK_W), tl.float32)
    if C_SKIP > 0:
        acc = _add_source(
            acc, skip_desc, weight_desc, image, row - PADDING, column - PADDING, n, 0, C_SKIP,
            C_SKIP + C, BLOCK_H, BLOCK_W, BLOCK_K, PRECISION,
        )
    acc = _add_source(
        acc, x_desc, weight_desc, image, row - PADDING, column - PADDING, n, C_SKIP, C, C_SKIP + C,
        BLOCK_H, BLOCK_W, BLOCK_K, PRECISION,
    )
    if bias_ptr is not None:
        channel = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + channel, mask=channel < C_OUT, other=0.0).to(tl.float32)[:, None]
    if RELU:
        acc = _larger(acc, 0.0)
    if mask_desc is not None:
        mask = mask_desc.load([image, row, column, n]).reshape(BLOCK_H * BLOCK_W, BLOCK_N)
        # as PyTorch: a NaN is not <= 0
        acc = tl.where(mask.T <= 0, 0.0, acc)
    y = acc.to(y_desc.dtype)
    y_desc.store([image, row, column, n], y.T.reshape(1, BLOCK_H, BLOCK_W, BLOCK_N))
    if pooled_desc is not None:
        blocks = acc.reshape(BLOCK_N, BLOCK_H // 2, 2, BLOCK_W // 2, 2)
        pooled = tl.reduce(tl.reduce(blocks, 4, _larger), 2, _larger)
        pooled = pooled.reshape(BLOCK_N, BLOCK_H * BLOCK_W // 4).to(y_desc.dtype)
        pooled = pooled.T.reshape(1, BLOCK_H // 2, BLOCK_W // 2, BLOCK_N)
        pooled_desc.store([image, row // 2, column // 2, n], pooled)


@triton.jit
def block_pixels(batch, height, width, BLOCK_P: tl.constexpr, program):
    """Image, row and column of BLOCK_P pixels, counted in 2x2 blocks, and whether they exist.

    ``program`` has as many bits as it takes to count all pixels.
    """
    pixel = program * BLOCK_P + tl.arange(0, BLOCK_P)
    image, row, column, _ = blocks_of(batch, height, width, pixel // 4)
    row = row * 2 + (pixel % 4 // 2).to(tl.int32)
    column = column * 2 + (pixel % 2).to(tl.int32)
    return image, row, column, (image < batch) & (row < height) & (column < width)


@triton.jit
def blocks_of(batch, height, width, block):
    """Image, row and column of 2x2 blocks, and whether they are whole."""
    blocks_w = (width + 1) // 2
    blocks = (height + 1) // 2 * blocks_w
    image, block = block // blocks, block % blocks
    row, column = (block // blocks_w).to(tl.int32), (block % blocks_w).to(tl.int32)
    return image, row, column, (image < batch) & (row < height // 2) & (column < width // 2)


@triton.jit
def _add_gathered(
    acc, x_ptr, weight_ptr, image, row, column, channel, inside, in_height, in_width, c_out,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w, w_stride_o, w_stride_c, w_stride_h, w_stride_w,
    C: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):
    """Add one source's nine taps to acc, [pixels, BLOCK_N]."""
    # few channels: all taps in one block
    FLAT: tl.constexpr = 9 * C <= 64
    SIZE: tl.constexpr = 9 * C if FLAT else C
    BLOCKS: tl.constexpr = (SIZE + BLOCK_K - 1) // BLOCK_K
    x_ptr += image.to(tl.int64)[:, None] * x_stride_b
    weight_ptr += channel[None, :].to(tl.int64) * w_stride_o
    for step in range(BLOCKS if FLAT else 9 * BLOCKS):
        k = step % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        known = k < SIZE
        if FLAT:
            tap, c = k // C, k % C
        else:
            tap, c = step // BLOCKS + tl.zeros_like(k), k
        i = row[:, None] + (tap // 3)[None, :] - PADDING
        j = column[:, None] + (tap % 3)[None, :] - PADDING
        there = (i >= 0) & (i < in_height) & (j >= 0) & (j < in_width)
        at = (
            i.to(INDEX) * x_stride_h + j.to(INDEX) * x_stride_w + c[None, :].to(INDEX) * x_stride_c
        )
        pixels = tl.load(x_ptr + at, mask=there & inside[:, None] & known[None, :], other=0.0)
        of = c.to(tl.int64) * w_stride_c + tap // 3 * w_stride_h + tap % 3 * w_stride_w
        weights = tl.load(
            weight_ptr + of[:, None], mask=known[:, None] & (channel < c_out)[None, :], other=0.0
        )
        acc = tl.dot(pixels, weights, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_relu_fwd_pointer_kernel(
    skip_ptr, x_ptr, weight_ptr, bias_ptr, mask_ptr, y_ptr, pooled_ptr,
    batch, in_height, in_width, height, width, c_out, tiles_n,
    skip_stride_b, skip_stride_c, skip_stride_h, skip_stride_w,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    w_stride_o, w_stride_c, w_stride_h, w_stride_w,
    mask_stride_b, mask_stride_c, mask_stride_h, mask_stride_w,
    y_stride_b, y_stride_c, y_stride_h, y_stride_w,
    pooled_stride_b, pooled_stride_c, pooled_stride_h, pooled_stride_w,
    C_SKIP: tl.constexpr, C: tl.constexpr, PADDING: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """BLOCK_N output channels of BLOCK_P pixels of the batch, which are counted in 2x2 blocks.

    Bytes as for tensor descriptors, in any layout.
    """
    channel = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    block = (tl.program_id(0) // tiles_n).to(INDEX)
    image, row, column, inside = block_pixels(batch, height, width, BLOCK_P, block)

    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if C_SKIP > 0:
        acc = _add_gathered(
            acc, skip_ptr, weight_ptr, image, row, column, channel, inside, in_height, in_width,
            c_out, skip_stride_b, skip_stride_c, skip_stride_h, skip_stride_w, w_stride_o,
            w_stride_c, w_stride_h, w_stride_w, C_SKIP, PADDING, BLOCK_K, PRECISION, INDEX,
        )
    acc = _add_gathered(
        acc, x_ptr, weight_ptr + C_SKIP * w_stride_c, image, row, column, channel, inside,
        in_height, in_width, c_out, x_stride_b, x_stride_c, x_stride_h, x_stride_w, w_stride_o,
        w_stride_c, w_stride_h, w_stride_w, C, PADDING, BLOCK_K, PRECISION, INDEX,
    )
    known = channel < c_out
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = _larger(acc, 0.0)
    channel = channel[None, :].to(tl.int64)
    written = inside[:, None] & known[None, :]
    if mask_ptr is not None:
        at = (
            image.to(tl.int64) * mask_stride_b
            + row.to(tl.int64) * mask_stride_h
            + column.to(tl.int64) * mask_stride_w
        )
        mask = tl.load(mask_ptr + at[:, None] + channel * mask_stride_c, mask=written, other=0.0)
        # as PyTorch: a NaN is not <= 0
        acc = tl.where(mask <= 0, 0.0, acc)
    at = image.to(tl.int64) * y_stride_b + row.to(tl.int64) * y_stride_h + column.to(tl.int64) * y_stride_w
    tl.store(
        y_ptr + at[:, None] + channel * y_stride_c, acc.to(y_ptr.dtype.element_ty), mask=written
    )
    if pooled_ptr is not None:
        pooled = tl.reduce(acc.reshape(BLOCK_P // 4, 4, BLOCK_N), 1, _larger)
        first = block * (BLOCK_P // 4) + tl.arange(0, BLOCK_P // 4)
        image, row, column, whole = blocks_of(batch, height, width, first)
        at = (
            image.to(tl.int64) * pooled_stride_b
            + row.to(tl.int64) * pooled_stride_h
            + column.to(tl.int64) * pooled_stride_w
        )
        tl.store(
            pooled_ptr + at[:, None] + channel * pooled_stride_c,
            pooled.to(y_ptr.dtype.element_ty),
            mask=whole[:, None] & known[None, :],
        )


def convolve(
    sources: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    padding: int, y: Tensor, tile: Tile, *, relu: bool,
    mask: Tensor | None = None,
    pooled: Tensor | None = None,
    signed: tuple[object, ...] | None = None,
) -> None:
    """Write a 3x3 convolution into ``y`` and ``pooled``.

    Args:
        sources: one or two [B, C, H, W], whose channels follow one another.
        weight: [C_out, C_all, 3, 3].
        bias: [C_out].
        padding: 0 to 2.
        y: [B, C_out, H', W'], any view.
        tile: kernel and blocks.
        relu: clamp at zero.
        mask: [B, C_out, H', W'], where it is not positive ``y`` becomes 0.
        pooled: [B, C_out, H' // 2, W' // 2].
        signed: as of ``Launcher``.
    """
    launch = _convolve_tma if tile.kernel == "tma" else _convolve_pointer
    launch(sources, weight, bias, padding, y, tile, relu, mask, pooled, signed)


def why_not_tma(*tensors: Tensor) -> str | None:
    """Why tensor descriptors cannot address these images or weights, or None."""
    for tensor in tensors:
        pixels = tensor.permute(0, 2, 3, 1)
        steps = [stride * tensor.element_size() for stride in _strides(pixels)[:-1]]
        aligned = all(step > 0 and step % 16 == 0 for step in [*steps, tensor.data_ptr() or 16])
        if pixels.stride(3) != 1 or not aligned:
            return "tensor descriptors need channels_last with rows of 16 bytes"
    return None


def _strides(pixels: Tensor) -> list[int]:
    """The strides of [B, H, W, C]; an axis of one element has whatever stride fits."""
    strides = list(pixels.stride())
    for axis in (2, 1, 0):
        if pixels.shape[axis] == 1:
            strides[axis] = strides[axis + 1] * max(pixels.shape[axis + 1], 8)
    return strides


def descriptor(images: Tensor, block: list[int]) -> TensorDescriptor:
    """Tiles [1, h, w, c] of [B, C, H, W]."""
    pixels = images.permute(0, 2, 3, 1)
    return TensorDescriptor(pixels, list(pixels.shape), _strides(pixels), block)


def index_type(*tensors: Tensor | None) -> tl.dtype:
    """What counts the elements of the largest of these."""
    return tl.int64 if is_wide(*tensors) else tl.int32


def tiles_of(number: int, block: list[int]) -> Described:
    """Those of the tensor of that number, as an argument."""
    return Described(number, lambda images: descriptor(images, block))


_tma = Launcher(_conv_relu_fwd_tma_kernel)
_pointer = Launcher(_conv_relu_fwd_pointer_kernel)


def _convolve_tma(sources, weight, bias, padding, y, tile, relu, mask, pooled, signed):
    # a matrix as they lie in memory; a part of wider weights is copied in each call
    weight = weight.contiguous(memory_format=torch.channels_last)

    def prepare() -> Launch:
        (b, c_out, height, width), c_all = y.shape, weight.shape[1]
        pixels = [1, tile.block_h, tile.block_w]
        tiles = [
            triton.cdiv(size, block)
            for size, block in ((c_out, tile.block_n), (height, tile.block_h), (width, tile.block_w))
        ]
        arguments = [
            tiles_of(0, [*pixels, tile.block_k]), tiles_of(1, [*pixels, tile.block_k]),
            Described(2, lambda weight: TensorDescriptor(
                weight, [c_out, 9 * c_all], [9 * c_all, 1], [tile.block_n, tile.block_k]
            )),
            None if bias is None else At(3),
            None if mask is None else tiles_of(4, [*pixels, tile.block_n]),
            tiles_of(5, [*pixels, tile.block_n]),
            None if pooled is None else tiles_of(6, [1, tile.block_h // 2, tile.block_w // 2, tile.block_n]),
            *tiles,
        ]  # fmt: skip
        return Launch((b * tiles[0] * tiles[1] * tiles[2],), arguments, {
            "C_SKIP": 0 if len(sources) == 1 else sources[0].shape[1], "C": sources[-1].shape[1], "C_OUT": c_out,
            "PADDING": padding, "RELU": relu, "BLOCK_N": tile.block_n, "BLOCK_H": tile.block_h, "BLOCK_W": tile.block_w,
            "BLOCK_K": tile.block_k, "PRECISION": "tf32", "num_warps": tile.warps, "num_stages": tile.stages,
        })  # fmt: skip

    key = (len(sources), padding, relu, tile, mask is None, pooled is None)
    _tma((sources[0], sources[-1], weight, bias, mask, y, pooled), key, prepare, signed)


def _convolve_pointer(sources, weight, bias, padding, y, tile, relu, mask, pooled, signed):
    tensors = (sources[0], sources[-1], weight, bias, mask, y, pooled)

    def prepare() -> Launch:
        b, c_out, height, width = y.shape
        tiles_n = triton.cdiv(c_out, tile.block_n)
        blocks = b * triton.cdiv(height, 2) * triton.cdiv(width, 2)
        no_strides = (0,) * 4
        arguments = [
            At(0), At(1), At(2), None if bias is None else At(3), None if mask is None else At(4), At(5),
            None if pooled is None else At(6),
            b, *sources[-1].shape[2:], height, width, c_out, tiles_n,
            *sources[0].stride(), *sources[-1].stride(), *weight.stride(),
            *(no_strides if mask is None else mask.stride()),
            *y.stride(), *(no_strides if pooled is None else pooled.stride()),
        ]  # fmt: skip
        return Launch((tiles_n * triton.cdiv(4 * blocks, tile.pixels),), arguments, {
            "C_SKIP": 0 if len(sources) == 1 else sources[0].shape[1], "C": sources[-1].shape[1],
            "PADDING": padding, "RELU": relu, "BLOCK_N": tile.block_n, "BLOCK_P": tile.pixels, "BLOCK_K": tile.block_k,
            "PRECISION": "tf32", "INDEX": index_type(*tensors), "num_warps": tile.warps, "num_stages": tile.stages,
        })  # fmt: skip

    key = (len(sources), padding, relu, tile, mask is None, pooled is None)
    _pointer(tensors, key, prepare, signed)
