"""What each convolution of figure 1 must cost on a GPU: the table of docs/maths/conv_relu.md.

``python -m fastunet_benchmarks.floors`` prints it.
"""

import math
import sys

from .figure import PAPER_SIZE, Arrow, arrows

# measured ceilings, bytes and operations a second: bfloat16 products, and copies on H100 and H200
PRODUCTS = 0.79e15
H100, H200 = 3.0e12, 4.3e12
BYTES = 2

HEADER = """\
| layer | input | GFLOP | MB | us, products | us, bytes H100 | H200 | us, eager's passes | \
L2 MB, 64 x 256 | 128 x 256 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def table() -> str:
    """The counts of each layer at batch 1 in bfloat16, and their sums, as Markdown."""
    counted = [(_name(a), f"{a.size}²", counts(a)) for a in arrows(PAPER_SIZE) if a.kind == "conv"]
    sums = [sum(column) for column in zip(*(values for *_, values in counted), strict=True)]
    lines = [HEADER]
    for name, size, values in [*counted, ("all", "", sums)]:
        cells = [f"{value:.1f}" if i < 2 else f"{value:.0f}" for i, value in enumerate(values)]
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts(arrow: Arrow) -> list[float]:
    """The numbers of one row, in the order of ``HEADER``."""
    moved = BYTES * _elements(arrow)
    return [
        arrow.flops / 1e9,
        moved / 1e6,
        arrow.flops / PRODUCTS * 1e6,
        moved / H100 * 1e6,
        moved / H200 * 1e6,
        BYTES * _extra_elements(arrow) / H100 * 1e6,
        _l2_bytes(arrow, 64) / 1e6,
        _l2_bytes(arrow, 128) / 1e6,
    ]


def _name(arrow: Arrow) -> str:
    return f"{arrow.channels} -> {arrow.c_out}{', pool' if arrow.pool else ''}"


def _elements(arrow: Arrow) -> int:
    """Each input read once, each output written once."""
    c_all, out = arrow.c_skip + arrow.c_in, arrow.size - 2
    pooled = arrow.c_out * (out // 2) ** 2 if arrow.pool else 0
    weights = 9 * c_all * arrow.c_out
    return c_all * arrow.size**2 + weights + arrow.c_out * out**2 + pooled


def _extra_elements(arrow: Arrow) -> int:
    """What eager PyTorch moves besides: bias and ReLU read and write y, pooling reads it, and the
    concatenation reads and writes the input.
    """
    out = arrow.c_out * (arrow.size - 2) ** 2
    concatenated = 2 * (arrow.c_skip + arrow.c_in) * arrow.size**2 if arrow.c_skip else 0
    return 4 * out + concatenated + (out if arrow.pool else 0)


def _l2_bytes(arrow: Arrow, block_n: int) -> int:
    """What the programs read if each computes block_n channels of 8 x 32 pixels."""
    height, width = 8, 32
    out = arrow.size - 2
    programs = math.prod(
        math.ceil(n / block) for n, block in ((arrow.c_out, block_n), (out, height), (out, width))
    )
    return BYTES * programs * 9 * (arrow.c_skip + arrow.c_in) * (block_n + height * width)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
