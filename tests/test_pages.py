"""Files of every kind give their pages; damaged and hostile ones give DataError and nothing else."""

import sys
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from fastunet.pages import DataError, PageSource, natural, open_pages

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 37, 41), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 37, 41), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (37, 41, 3), dtype=np.uint8)
MINISBLACK = {"photometric": "minisblack"}

Write = Callable[[Path], None]
Files = dict[str, tuple[Write, list[np.ndarray]]]


def pages_of(stack: np.ndarray) -> list[np.ndarray]:
    """The pages of [N, H, W] or [N, C, H, W], as [C, H, W]."""
    return [page.reshape(-1, *page.shape[-2:]) for page in stack]


def tiff(array: np.ndarray, **options: object) -> Write:
    return lambda path: tifffile.imwrite(path, array, **options)


def separate_tiff(pages: list[np.ndarray], **options: object) -> Write:
    """Every page with its own directory, as other writers do."""

    def write(path: Path) -> None:
        with tifffile.TiffWriter(path) as file:
            for page in pages:
                file.write(page, contiguous=False, metadata=None, **options)

    return write


def pillow(array: np.ndarray, **options: object) -> Write:
    return lambda path: Image.fromarray(array).save(path, **options)


def pillow_stack(stack: np.ndarray, **options: object) -> Write:
    first, *rest = [Image.fromarray(page) for page in stack]
    return lambda path: first.save(path, save_all=True, append_images=rest, **options)


def ome(array: np.ndarray, axes: str, **options: object) -> Write:
    return tiff(array, metadata={"axes": axes}, ome=True, **MINISBLACK, **options)


PAIRED = np.stack([GREY, GREY[::-1]], 1)  # [N, C, H, W]
TIFFS: Files = {
    "plain.tif": (tiff(GREY, **MINISBLACK), pages_of(GREY)),
    "one.TIFF": (tiff(DEEP[0]), pages_of(DEEP[:1])),
    "deflate.tif": (tiff(GREY, compression="zlib", rowsperstrip=5, **MINISBLACK), pages_of(GREY)),
    "lzw.tif": (tiff(DEEP, compression="lzw", predictor=True, **MINISBLACK), pages_of(DEEP)),
    "tiles.tif": (tiff(DEEP, compression="zstd", tile=(16, 16), **MINISBLACK), pages_of(DEEP)),
    "float.tif": (tiff(DEEP.astype("f4"), **MINISBLACK), pages_of(DEEP.astype("f4"))),
    "bool.tif": (tiff(GREY > 99, **MINISBLACK), pages_of(GREY > 99)),
    "bigendian.tif": (tiff(DEEP, byteorder=">", **MINISBLACK), pages_of(DEEP)),
    "bigtiff.tif": (tiff(DEEP, bigtiff=True, compression="zlib", **MINISBLACK), pages_of(DEEP)),
    "apart.tif": (separate_tiff(list(DEEP)), pages_of(DEEP)),
    "sizes.tif": (separate_tiff([GREY[0], GREY[1, :20], GREY[2, :, :9]]), []),
    "colour.tif": (tiff(COLOUR, photometric="rgb"), [np.moveaxis(COLOUR, -1, 0)]),
    "planar.tif": (
        tiff(np.moveaxis(COLOUR, -1, 0), photometric="rgb", compression="zlib"),
        [np.moveaxis(COLOUR, -1, 0)],
    ),
    "alpha.tif": (
        tiff(np.dstack([COLOUR, GREY[0]]), photometric="rgb", extrasamples=["unassalpha"]),
        [np.moveaxis(COLOUR, -1, 0)],
    ),
    "imagej.tif": (tiff(PAIRED, imagej=True, metadata={"axes": "ZCYX"}), pages_of(PAIRED)),
    "zc.ome.tif": (ome(PAIRED, "ZCYX", compression="zlib"), pages_of(PAIRED)),
    "cz.ome.tif": (ome(PAIRED.swapaxes(0, 1), "CZYX", compression="zlib"), pages_of(PAIRED)),
    "tz.ome.tif": (
        ome(np.stack([GREY, DEEP // 256]), "TZYX"),
        pages_of(np.concatenate([GREY, DEEP // 256])),
    ),
    "libtiff.tif": (pillow_stack(GREY, compression="tiff_lzw"), pages_of(GREY)),
    "libtiff-colour.tif": (
        pillow(COLOUR, compression="tiff_adobe_deflate"),
        [np.moveaxis(COLOUR, -1, 0)],
    ),
    "pillow.tif": (pillow_stack(GREY), pages_of(GREY)),
}
TIFFS["sizes.tif"] = (TIFFS["sizes.tif"][0], [GREY[:1], GREY[1:2, :20], GREY[2:3, :, :9]])
TIFFS["tz.ome.tif"] = (
    ome(np.stack([DEEP, DEEP[::-1]]), "TZYX"),
    pages_of(np.concatenate([DEEP, DEEP[::-1]])),
)
