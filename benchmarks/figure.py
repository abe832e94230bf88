"""The arrows of figure 1 at the sizes they have for one input, with their operations and bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastunet.unet import PAPER_WIDTHS

PAPER_SIZE = 572


@dataclass(frozen=True)
class Arrow:
    """One arrow of the unpadded network.

    Args:
        kind: "conv" (blue, with the concatenation it reads), "copy" (grey), "up" (green), "head".
        c_in, c_out: channels of x and of the result.
        size: height and width of x.
        c_skip, skip_size: of the skip connection that is cropped to x; 0 for none.
        pool: the 2x2 max-pooled copy (red) is made too.
    """

    kind: Literal["conv", "copy", "up", "head"]
    c_in: int
    c_out: int
    size: int
    c_skip: int = 0
    skip_size: int = 0
    pool: bool = False

    @property
    def channels(self) -> str:
        """Those that it reads, the skip's first, as tables show them: "512+512"."""
        return f"{self.c_skip}+{self.c_in}" if self.c_skip else f"{self.c_in}"

    @property
    def flops(self) -> int:
        """Operations for one image, two a multiply-add."""
        taps = {"conv": 9 * (self.size - 2) ** 2, "up": 4 * self.size**2, "head": self.size**2}
        return 2 * (self.c_skip + self.c_in) * self.c_out * taps.get(self.kind, 0)


def arrows(
    size: int,
    widths: tuple[int, ...] = PAPER_WIDTHS,
    in_channels: int = 1,
    n_classes: int = 2,
) -> Iterator[Arrow]:
    """The arrows in the order in which ``UNet.forward`` takes them, for a size that fits."""
    c, skips = in_channels, []
    for level, width in enumerate(widths):
        pool = level < len(widths) - 1
        yield Arrow("conv", c, width, size)
        yield Arrow("conv", width, width, size - 2, pool=pool)
        c, size = width, size - 4
        if pool:
            skips.append((width, size))
            size //= 2
    for width, skip_size in reversed(skips):
        yield Arrow("up", c, width, size)
        size *= 2
        yield Arrow("copy", width, 2 * width, size, width, skip_size)
        yield Arrow("conv", width, width, size, width, skip_size)
        yield Arrow("conv", width, width, size - 2)
        c, size = width, size - 4
    yield Arrow("head", c, n_classes, size)
