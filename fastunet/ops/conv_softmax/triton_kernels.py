"""The head and its softmax or argmax on GPUs: logits that never reach memory.

    y[p, k] = bias[k] + sum over channels c of  x[p, c] W[k, c]

Images are read as they lie in channels_last, results are written in planes, as the host wants them.
A pixel of C channels and K classes takes C values read, and 4 K bytes of probabilities or one byte
of a label written; eager PyTorch besides writes and reads its logits.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._triton import At, Launch, Launcher

# all of a pixel stay in one program's registers
MOST_CLASSES = 128
# of a program, in the dtype of its images: all logits, and a pixel's channels in each step
BLOCK_BYTES, STEP_BYTES = 8192, 128


@triton.jit
def _conv_softmax_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    pixels, blocks,
    C: tl.constexpr, CLASSES: tl.constexpr, LABELS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """All classes of BLOCK_P pixels of an image: probabilities, or the label.

    From global memory: x once and weights once, as far as L2 holds them; y is written once.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < pixels
    k = tl.arange(0, BLOCK_K)
    is_class = k < CLASSES
    x_ptr += b * pixels * C
    acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + p[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        weight = tl.load(weight_ptr + k[None, :] * C + c[:, None], mask=is_class[None, :] & (c < C)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=is_class, other=0.0).to(tl.float32)[None, :]
    # infinity times the zero of what is no class is NaN
    acc = tl.where(is_class[None, :], acc, float("-inf"))
    greatest = tl.max(acc, axis=1)
    if LABELS:
        # NaN is in no maximum
        nan = tl.min(tl.where(acc != acc, k[None, :], BLOCK_K), axis=1)
        label = tl.min(tl.where(acc == greatest[:, None], k[None, :], BLOCK_K), axis=1)
        label = tl.where(nan < BLOCK_K, nan, label)
        tl.store(y_ptr + b * pixels + p, label.to(tl.uint8), mask=inside)
    else:
        # but it is in the sum
        share = tl.exp(acc - greatest[:, None])
        y = share / tl.sum(share, axis=1)[:, None]
        y_ptr += b * pixels * CLASSES
        at = k.to(tl.int64)[None, :] * pixels + p[:, None]
        tl.store(y_ptr + at, y, mask=inside[:, None] & is_class[None, :])


_launch = Launcher(_conv_softmax_fwd_kernel)


def classify(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write probabilities or labels, whichever has the shape of ``y``.

    Args:
        x: [B, C, H, W] in channels_last.
        weight: [K, C, 1, 1], contiguous.
        bias: [K].
        y: [B, K, H, W] float32, or [B, H, W] uint8, contiguous.
    """
    (b, c, height, width), classes = x.shape, len(weight)

    def prepare() -> Launch:
        pixels, block_k = height * width, max(16, triton.next_power_of_2(classes))
        # counted in bytes: products in float32 have their operands in registers, and larger spill
        itemsize = x.element_size()
        block_p = min(128, BLOCK_BYTES // itemsize // block_k)
        blocks = triton.cdiv(pixels, block_p)
        arguments = [At(0), At(1), None if bias is None else At(2), At(3), pixels, blocks]
        options = {"C": c, "CLASSES": classes, "LABELS": y.ndim == 3}
        options |= {"BLOCK_P": block_p, "BLOCK_K": block_k}
        options |= {"BLOCK_C": min(STEP_BYTES // itemsize, max(16, triton.next_power_of_2(c)))}
        return Launch((b * blocks,), arguments, options | {"num_warps": 4, "num_stages": 3})

    _launch((x, weight, bias, y), (), prepare)
