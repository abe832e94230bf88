"""Copy and crop on a GPU: the kernels move bytes, so they serve every dtype.

A tensor is taken with its axes in the order in which the result lies in memory: planes of lines of
runs, for [B, C, H, W] the runs are rows of W pixels, for channels_last the C channels of a pixel.
Everything is counted in vectors of the most bytes, up to 16, that divide all addresses, strides and
runs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .reference import centre_crop

# vectors that one program copies
BLOCK = 512
WIDEST_BYTES = 16
# the integers that a vector is made of, at most two
WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _locate(program, sizes, BLOCK: tl.constexpr):
    """The plane's two indices, and of each vector its line, its place there and whether it exists."""
    inner_size, vectors, run = sizes
    blocks = tl.cdiv(vectors, BLOCK)
    plane, first = program // blocks, program % blocks * BLOCK
    lane = tl.arange(0, BLOCK)
    exists = lane < vectors - first
    line, place = (first + lane) // run, (first + lane) % run
    return plane // inner_size, plane % inner_size, line, place, exists


@triton.jit
def _offsets(outer, inner, line, place, strides):
    """Where vectors lie, in vectors."""
    plane = outer.to(tl.int64) * strides[0] + inner.to(tl.int64) * strides[1]
    return plane + line.to(tl.int64) * strides[2] + place.to(tl.int64) * strides[3]


@triton.jit
def _words(pointer, offsets, WORD: tl.constexpr, WORDS: tl.constexpr):
    """Pointers to the words of vectors, [BLOCK, WORDS]."""
    words = pointer.to(tl.pointer_type(WORD), bitcast=True)
    return words + (offsets[:, None] * WORDS + tl.arange(0, WORDS)[None, :])


@triton.jit
def _copy_block(
    program, from_ptr, from_strides, to_ptr, to_start, to_strides, sizes,
    WORD: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    outer, inner, line, place, exists = _locate(program, sizes, BLOCK)
    source = _offsets(outer, inner, line, place, from_strides)
    target = _offsets(outer, inner, line, place, to_strides) + to_start
    words = tl.load(_words(from_ptr, source, WORD, WORDS), mask=exists[:, None])
    tl.store(_words(to_ptr, target, WORD, WORDS), words, mask=exists[:, None])


@triton.jit
def _crop_concat_fwd_kernel(
    skip_ptr, up_ptr, out_ptr,
    skip_strides, up_strides, out_strides, up_start,
    skip_sizes, up_sizes, skip_programs,
    WORD: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program copies a block of a plane, of the skip's crop or of ``up``."""
    program = tl.program_id(0)
    if program < skip_programs:
        _copy_block(
            program, skip_ptr, skip_strides, out_ptr, 0, out_strides, skip_sizes, WORD, WORDS, BLOCK,
        )  # fmt: skip
    else:
        _copy_block(
            program - skip_programs, up_ptr, up_strides, out_ptr, up_start, out_strides, up_sizes,
            WORD, WORDS, BLOCK,
        )  # fmt: skip


@triton.jit
def _crop_concat_bwd_kernel(
    grad_ptr, out_ptr,
    grad_strides, out_strides,
    starts, lengths, out_sizes,
    WORD: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes a block of a plane of the skip's gradient: copies in the crop, else zeros."""
    outer, inner, line, place, exists = _locate(tl.program_id(0), out_sizes, BLOCK)
    target = _offsets(outer, inner, line, place, out_strides)
    outer, inner, line, place = (
        outer - starts[0],
        inner - starts[1],
        line - starts[2],
        place - starts[3],
    )
    source = _offsets(outer, inner, line, place, grad_strides)
    # compared as vectors: the interpreter of Triton 3.9 takes no masks that came of scalars
    outer, inner = outer + tl.zeros_like(line), inner + tl.zeros_like(line)
    inside = (outer >= 0) & (outer < lengths[0]) & (inner >= 0) & (inner < lengths[1])
    inside &= (line >= 0) & (line < lengths[2]) & (place >= 0) & (place < lengths[3])
    words = tl.load(_words(grad_ptr, source, WORD, WORDS), mask=(exists & inside)[:, None], other=0)
    tl.store(_words(out_ptr, target, WORD, WORDS), words, mask=exists[:, None])


def crop_concat_triton(skip: Tensor, up: Tensor) -> Tensor:
    """The concatenation in one pass: an element is read once and written once, 2 itemsize bytes.

    Accesses are 16 bytes wide where every run of skip's crop, of ``up`` and of the output starts at
    a multiple of 16 bytes, otherwise narrower by powers of two.
    """
    cropped = centre_crop(skip, up.shape[2], up.shape[3])
    b, c_up, h, w = up.shape
    c = skip.shape[1]
    formats = {suggest_memory_format(half) for half in (cropped, up)}
    out = torch.empty(
        (b, c + c_up, h, w),
        dtype=up.dtype,
        device=up.device,
        memory_format=formats.pop() if len(formats) == 1 else torch.contiguous_format,
    )
    if out.numel() == 0:
        return out
    axes = _axes(out)
    tensors = (cropped, up, out)
    up_start = c * out.stride(1)
    vector_bytes = _vector_bytes(tensors, axes, [up_start, *(t.shape[axes[3]] for t in tensors)])
    (skip_programs, skip_sizes), (up_programs, up_sizes) = (
        _grid(_in_vectors(half.shape, half, axes, vector_bytes)) for half in (cropped, up)
    )
    _crop_concat_fwd_kernel[(skip_programs + up_programs,)](
        *(_integers(tensor) for tensor in tensors),
        *(_strides(tensor, axes, vector_bytes) for tensor in tensors),
        up_start * out.element_size() // vector_bytes,
        skip_sizes, up_sizes, skip_programs,
        **_constants(vector_bytes),
    )  # fmt: skip
    return out


def crop_concat_bwd_triton(grad: Tensor, skip: Tensor) -> Tensor:
    """The skip's gradient in one pass: itemsize bytes read an element of the crop, written one of skip.

    Accesses are 16 bytes wide where the runs of both and the crop's left margin start at multiples of
    16 bytes, otherwise narrower by powers of two. The values of ``skip`` are not read.
    """
    out = torch.empty_like(skip)
    if out.numel() == 0:
        return out
    axes = _axes(out)
    tensors = (grad[:, : skip.shape[1]], out)
    kept = tensors[0].shape
    margins = [(have - keep) // 2 for have, keep in zip(out.shape, kept, strict=True)]
    regions = (margins, kept, out.shape)
    vector_bytes = _vector_bytes(tensors, axes, [region[axes[3]] for region in regions])
    starts, lengths, extents = (_in_vectors(region, out, axes, vector_bytes) for region in regions)
    programs, sizes = _grid(extents)
    _crop_concat_bwd_kernel[(programs,)](
        *(_integers(tensor) for tensor in tensors),
        *(_strides(tensor, axes, vector_bytes) for tensor in tensors),
        starts, lengths, sizes,
        **_constants(vector_bytes),
    )  # fmt: skip
    return out


def _axes(tensor: Tensor) -> list[int]:
    """From the slowest in memory to the fastest; axes of one element, which have no place, first."""
    return sorted(range(4), key=lambda axis: (tensor.shape[axis] > 1, -tensor.stride()[axis]))


def _vector_bytes(tensors: Sequence[Tensor], axes: list[int], extents: list[int]) -> int:
    """The most bytes that divide addresses, strides and ``extents`` along runs; an element if strided."""
    *outer, run = axes
    element_bytes = tensors[0].element_size()
    if any(tensor.shape[run] > 1 and tensor.stride(run) != 1 for tensor in tensors):
        return element_bytes
    strides = [t.stride(axis) for t in tensors for axis in outer if t.shape[axis] > 1]
    bits = WIDEST_BYTES
    for count in (*extents, *strides):
        bits |= count * element_bytes
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


def _in_vectors(
    extents: Sequence[int], tensor: Tensor, axes: list[int], vector_bytes: int
) -> tuple[int, ...]:
    """Extents along ``axes``, the last of them in vectors."""
    *outer, run = (extents[axis] for axis in axes)
    return (*outer, run * tensor.element_size() // vector_bytes)


def _grid(extents: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How many programs copy ``extents``, and what ``_locate`` needs of them."""
    outer, inner, lines, run = extents
    vectors = lines * run
    return outer * inner * triton.cdiv(vectors, BLOCK), (inner, vectors, run)


def _strides(tensor: Tensor, axes: list[int], vector_bytes: int) -> tuple[int, ...]:
    """In vectors, of which the last axis has one after the other or, if strided, one an element."""
    element_bytes = tensor.element_size()
    *outer, run = (tensor.stride(axis) for axis in axes)
    last = run if vector_bytes == element_bytes else 1
    return (*(stride * element_bytes // vector_bytes for stride in outer), last)


def _integers(tensor: Tensor) -> Tensor:
    """The same memory, of a dtype that Triton knows."""
    if tensor.dtype.is_complex and tensor.element_size() > 8:
        return torch.view_as_real(tensor)
    return tensor.view(INTEGERS[tensor.element_size()])


def _constants(vector_bytes: int) -> dict[str, object]:
    word_bytes = min(vector_bytes, max(WORDS))
    return {"WORD": WORDS[word_bytes], "WORDS": vector_bytes // word_bytes, "BLOCK": BLOCK}
