"""Where predictions go: the pages of a TIFF file, and pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .files import replacing

if TYPE_CHECKING:
    from .pages import Page

# longer sides of an overlay are thinned out: it needs little memory and can be looked at
OVERLAY_PX = 2048


@dataclass(frozen=True)
class TiffPages:
    """The pages of an uncompressed TIFF file, which any process may map and fill."""

    path: Path
    dtype: type[np.generic]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]

    def page(self, i: int) -> NDArray[Any]:
        """Page ``i``, mapped for writing."""
        return np.memmap(self.path, self.dtype, "r+", self.offsets[i], self.shapes[i])


def create(path: Path, shapes: Sequence[tuple[int, ...]], dtype: type[np.generic]) -> TiffPages:
    """Make a TIFF file of empty pages; nothing is written in advance.

    Args:
        path: the file, replaced if it is there.
        shapes: of each page, [H, W] or [K, H, W]. Pages of one shape become one stack, others a
            series each.
        dtype: of the values.
    Returns: the pages.
    Raises: ValueError, naming the folder, if the disk has not the room; OSError if it refuses.
    """
    import tifffile

    needed = sum(int(np.prod(shape)) for shape in shapes) * np.dtype(dtype).itemsize
    free = disk_usage(path.parent).free
    # writing to a mapped file on a full disk kills the process
    if needed > free:
        raise ValueError(f"predict: {path.parent} must have {needed} bytes free, got {free}")
    common: dict[str, Any] = {"dtype": dtype, "photometric": "minisblack"}
    axes = "CYX" if len(shapes[0]) == 3 else "YX"
    if len(set(shapes)) == 1:
        shape = (len(shapes), *shapes[0])
        stack = tifffile.memmap(path, shape=shape, metadata={"axes": f"Q{axes}"}, **common)
        page_bytes = needed // len(shapes)
        offsets = [stack.offset + i * page_bytes for i in range(len(shapes))]
    else:
        # the first page decides whether offsets have 64 bits, as tifffile would of one stack
        common |= {"bigtiff": needed > 2**32 - 2**25, "metadata": {"axes": axes}}
        offsets = [
            tifffile.memmap(path, shape=shape, append=i > 0, **common).offset
            for i, shape in enumerate(shapes)
        ]
    return TiffPages(path, dtype, tuple(shapes), tuple(offsets))


def narrow(pages: TiffPages, dtype: type[np.generic]) -> None:
    """Write ``pages`` anew in a smaller type that holds their values."""
    with replacing(pages.path) as temporary:
        small = create(temporary, pages.shapes, dtype)
        for i in range(len(pages.shapes)):
            small.page(i)[:] = pages.page(i)


def pictures(overlay: str | Path | None, pages: int) -> list[Path | None]:
    """Where the overlay of each page goes."""
    if overlay is None:
        return [None] * pages
    overlay = Path(overlay)
    if overlay.suffix.lower() != ".png":
        return [overlay / f"{i:04d}.png" for i in range(pages)]
    if pages != 1:
        raise ValueError(f"predict: the overlay of {pages} pages must be a folder, got {overlay}")
    return [overlay]


def draw(path: Path, page: "Page", result: NDArray[Any], output: str) -> None:
    """A picture of a page and its result, thinned out to ``OVERLAY_PX``."""
    from .figures import overlay, write_png

    step = -(-max(page.shape[1:]) // OVERLAY_PX)
    values = np.asarray(result[..., ::step, ::step])
    if output == "probability":
        values = values.argmax(0) if values.ndim == 3 else values > 0.5
    write_png(path, overlay(np.asarray(page[:, ::step, ::step]), values))
