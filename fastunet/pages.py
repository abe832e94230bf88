"""Pages of image files, opened by number: TIFF, PNG, JPEG, NumPy and Zarr behind one face.

A page is an image [C, H, W]. Which axes of a file are pages and which are channels:

- TIFF: as the file names its axes. Channels and samples are C; time, depth and every other axis
  count pages, the last one fastest.
- ``.npy`` and Zarr, by number of axes: [H, W], [N, H, W] or [N, C, H, W] with N pages. An OME-Zarr
  group names its axes and is read as a TIFF is, at full resolution.
- PNG and JPEG: one page a file, samples are C.

Values are those stored. Alpha is dropped: it is transparency and not a measurement. A coloured
palette gives its indices, which are class ids in label pictures; a grey one gives its greys.
"""

import logging
import math
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import imagecodecs
import numpy as np
from PIL import Image
from tifffile import TiffFile, TiffPage

# what tifffile finds wrong with a file is raised as DataError, so it need not be printed as well
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# of one value, by the number of its type
_TIFF_TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)


class DataError(ValueError):
    """A file, folder or array that cannot be used; the message says which, and why."""


class Page(Protocol):
    """One image [C, H, W]: an array, or something that reads only what is sliced from it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True)
class _Entry:
    """A page that has not been read."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    read: Callable[[], Page]


class PageSource:
    """The pages of a file or folder, in order, as ``open_pages`` finds them."""

    def __init__(self, files: list[tuple[Path, str, list[_Entry]]]) -> None:
        self._entries = [entry for _, _, entries in files for entry in entries]
        self._files = [file for file, _, entries in files for _ in entries]
        self._names = [
            name if len(entries) == 1 else f"{name} page {number}"
            for _, name, entries in files
            for number in range(len(entries))
        ]
        for name, entry in zip(self._names, self._entries, strict=True):
            if 0 in entry.shape:
                raise DataError(f"{name}: wanted pixels, got shape {list(entry.shape)}")
            if entry.dtype.kind not in "buif":
                raise DataError(f"{name}: wanted integers, floats or bools, got {entry.dtype}")

    def __len__(self) -> int:
        return len(self._entries)

    def file(self, i: int) -> Path:
        """The file that holds page ``i``."""
        return self._files[i]

    def name(self, i: int) -> str:
        """What messages call page ``i``, as in "stack.tif page 3" (pages count from 0)."""
        return self._names[i]

    def shape(self, i: int) -> tuple[int, int, int]:
        """(C, H, W) of page ``i``."""
        return self._entries[i].shape

    def dtype(self, i: int) -> np.dtype[Any]:
        """The dtype of page ``i``, in the byte order of the file where that is mapped."""
        return self._entries[i].dtype

    def page(self, i: int) -> Page:
        """Open page ``i`` for slicing, ``page[:, y0:y1, x0:x1]``.

        Returns: [C, H, W]; uncompressed TIFF and ``.npy`` are mapped into memory and Zarr is read
            by chunks, so a slice reads little more than itself; the rest is an array in memory.
        Raises: DataError if the file is damaged.
        """
        with _reading(self._names[i]):
            return self._entries[i].read()


def open_pages(path: str | Path) -> PageSource:
    """Open a file or folder of images without reading their pixels.

    Args:
        path: a TIFF, PNG, JPEG or ``.npy`` file, a Zarr array or group (a folder or a ``.zip``), or
            a folder of such files, taken in natural order ("2.png" before "10.png"); a folder's
            other files, hidden files and folders are passed over.
    Returns: the pages; the module says what is a page and what is a channel.
    Raises: DataError if the path, or any file in the folder, is not such a file or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir() and not _is_zarr(path):
        files = [file for file in path.iterdir() if _is_picture(file)]
        if not files:
            raise DataError(f"{path}: wanted a folder of images ({_SUFFIXES}), found none in it")
        files.sort(key=lambda file: _natural(file.name))
        return PageSource([(file, f"{path.name}/{file.name}", _open(file)) for file in files])
    return PageSource([(path, path.name, _open(path))])


def _natural(name: str) -> list[Any]:
    """A sort key that takes digits in ``name`` as numbers."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)] + [name]


@contextmanager
def _reading(what: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError about ``what``."""
    try:
        yield
    # given a damaged file, a decoder raises whatever its author did not foresee
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        if " " not in reason:
            # a missing key, for instance, says nothing but its name
            reason = f"it seems damaged ({type(error).__name__}: {reason})"
        raise DataError(f"{what}: cannot be read: {reason}") from error


def _is_zarr(path: Path) -> bool:
    markers = ("zarr.json", ".zarray", ".zgroup")
    return path.suffix == ".zarr" or any((path / marker).exists() for marker in markers)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _READERS and path.is_file() and not path.name.startswith(".")


def _open(path: Path) -> list[_Entry]:
    """The pages of one file or Zarr folder."""
    reader = _open_zarr if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: wanted a folder, Zarr or one of {_SUFFIXES}, got '{path.suffix}'")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    with _reading(path):
        entries = reader(path)
    if not entries:
        raise DataError(f"{path}: wanted at least one page, got none")
    return entries


def _cut(
    shape: tuple[int, ...],
    axes: str,
    dtype: np.dtype[Any],
    read: Callable[[tuple[Any, ...], str], Page],
    colours: slice = slice(None),
) -> list[_Entry]:
    """One entry for each page of an array with the named axes.

    ``read`` takes an index into the array and the axes that it leaves; ``colours`` are the
    samples (axis S) to keep.
    """
    if axes.count("Y") != 1 or axes.count("X") != 1:
        raise ValueError(f"wanted one axis Y and one X, got axes '{axes}' of shape {list(shape)}")
    size = dict(zip(axes, shape, strict=True))
    samples = len(range(size.get("S", 1))[colours])
    page_shape = (size.get("C", 1) * samples, size["Y"], size["X"])
    kept = "".join(axis for axis in axes if axis in "CSYX")
    entries = []
    for at in np.ndindex(*[n for n, axis in zip(shape, axes, strict=True) if axis not in "CSYX"]):
        numbers = iter(at)
        index = tuple(
            colours if axis == "S" else slice(None) if axis in "CYX" else next(numbers)
            for axis in axes
        )
        entries.append(_Entry(page_shape, dtype, partial(read, index, kept)))
    return entries


def _page(array: Any, index: tuple[Any, ...], axes: str) -> np.ndarray:
    """View ``array[index]``, which has axes among C, S, Y and X, as [C, H, W]."""
    page = np.asanyarray(array[index])
    page = page.transpose([axes.index(axis) for axis in "CSYX" if axis in axes])
    return page.reshape(-1, *page.shape[-2:])


def _open_tiff(path: Path) -> list[_Entry]:
    with TiffFile(path) as tif:
        _check_directories(tif)
        return [entry for series in tif.series for entry in _tiff_series(tif, series)]


def _check_directories(tif: TiffFile) -> None:
    """Raise unless the directories, and what they point at, lie within the file.

    Of a truncated file tifffile reads what is left, without the lost pages and properties.
    """
    file, tiff, seen = tif.filehandle, tif.tiff, set()
    offset = tif.pages.first.offset
    while offset and offset not in seen:
        seen.add(offset)
        file.seek(offset)
        try:
            (count,) = struct.unpack(tiff.tagnoformat, file.read(tiff.tagnosize))
            tags = list(struct.iter_unpack(tiff.tagheaderformat, file.read(count * tiff.tagsize)))
            (offset,) = struct.unpack(tiff.offsetformat, file.read(tiff.offsetsize))
        except struct.error:
            raise ValueError(f"truncated: no directory of page {len(seen) - 1}") from None
        for code, kind, number, value in tags:
            # tags from 32768 on are private: their makers know where they point
            size = number * _TIFF_TYPE_BYTES[kind] if code < 32768 else 0
            if size > tiff.tagoffsetthreshold:
                _check_end(struct.unpack(tiff.offsetformat, value)[0] + size, file.size)


def _tiff_series(tif: TiffFile, series: Any) -> list[_Entry]:
    """The pages of one series, which is an array spread over the directories of a TIFF file."""
    shape, axes, dtype = tuple(series.shape), series.axes, np.dtype(series.dtype)
    alpha = "S" in axes and tuple(series.keyframe.extrasamples)[-1:] in ((1,), (2,))
    colours = slice(None, -1) if alpha else slice(None)
    mapped = series.keyframe.is_memmappable
    if mapped:
        dtype = dtype.newbyteorder(tif.byteorder)
    if mapped and series.dataoffset is not None:
        whole = np.memmap(tif.filehandle.path, dtype, "r", series.dataoffset, shape)
        return _cut(shape, axes, dtype, partial(_page, whole), colours)
    places = [_place(page) for page in series.pages]
    # the leading axes count directories, the others lie within one
    split = next(n for n in range(len(shape)) if math.prod(shape[:n]) == len(places))
    directories = np.arange(len(places)).reshape(shape[:split])

    def directory(number: int) -> np.ndarray:
        file, offset, data_offset = places[number]
        if mapped:
            return np.memmap(file, dtype, "r", data_offset, shape[split:])
        with TiffFile(file) as tif:
            tif.filehandle.seek(offset)
            array = TiffPage(tif, index=0).asarray()
        return array.astype(dtype, copy=False).reshape(shape[split:])

    def read(index: tuple[Any, ...], kept: str) -> np.ndarray:
        numbers = np.asarray(directories[index[:split]])
        parts = [directory(number)[index[split:]] for number in numbers.flat]
        array = parts[0] if numbers.ndim == 0 else np.stack(parts)
        return _page(array, (...,), kept)

    return _cut(shape, axes, dtype, read, colours)


def _place(page: Any) -> tuple[Path, int, int]:
    """File of a TIFF directory, its offset and that of its pixels, all of which are there."""
    if page is None:
        raise ValueError("the file lists a page that it does not hold")
    file = page.parent.filehandle
    ends = [start + n for start, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    _check_end(max(ends), file.size)
    return Path(file.path), page.offset, page.dataoffsets[0]


def _check_end(end: int, size: int) -> None:
    if end > size:
        raise ValueError(f"truncated: wanted {end} bytes, got {size}")


def _open_picture(path: Path) -> list[_Entry]:
    with path.open("rb") as file, Image.open(file, formats=("PNG", "JPEG")) as image:
        channels = sum(band != "A" for band in image.getbands())
        file.seek(24)
        # the byte of a PNG header that says so; Pillow reads sixteen bits only where they are grey
        deep = image.format == "PNG" and file.read(1) == b"\x10"
        dtype = np.dtype(np.uint16 if deep else bool if image.mode == "1" else np.uint8)
        shape = (channels, image.height, image.width)

    def read() -> np.ndarray:
        if deep:
            array = imagecodecs.png_decode(path.read_bytes())
        else:
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                array = np.asarray(image.convert("L") if _has_grey_palette(image) else image)
        return np.moveaxis(array.reshape(*shape[1:], -1)[..., :channels], -1, 0)

    return [_Entry(shape, dtype, read)]


def _has_grey_palette(image: Image.Image) -> bool:
    palette = image.getpalette("RGB") if image.mode == "P" else None
    return palette is not None and palette[0::3] == palette[1::3] == palette[2::3]


def _open_npy(path: Path) -> list[_Entry]:
    array = np.lib.format.open_memmap(path, mode="r")
    return _cut(array.shape, _plain_axes(array.shape), array.dtype, partial(_page, array))


def _plain_axes(shape: tuple[int, ...]) -> str:
    """The axes of an array that does not name them."""
    axes = {2: "YX", 3: "NYX", 4: "NCYX"}.get(len(shape))
    if axes is None:
        raise ValueError(f"wanted [H, W], [N, H, W] or [N, C, H, W], got shape {list(shape)}")
    # an image with its channels last would pass for a pile of slivers
    if len(shape) > 2 and shape[-1] <= 4 < shape[-2]:
        raise ValueError(f"wanted channels before rows, [N, C, H, W], got shape {list(shape)}")
    return axes


def _open_zarr(path: Path) -> list[_Entry]:
    try:
        import zarr  # optional, and slow to import
    except ImportError as error:
        raise ImportError("Zarr needs a package: pip install 'fastunet[zarr]'") from error
    store = zarr.storage.ZipStore(str(path), mode="r") if path.is_file() else str(path)
    array, axes = zarr.open(store, mode="r"), None
    if isinstance(array, zarr.Group):
        array, axes = _array_of(array)
    shape = tuple(array.shape)
    read = partial(_ZarrPage, path, array)
    return _cut(shape, axes or _plain_axes(shape), np.dtype(array.dtype), read)


def _array_of(group: Any) -> tuple[Any, str | None]:
    """The array of a Zarr group, and its axes where OME metadata name them."""
    scales = group.attrs.get("ome", group.attrs).get("multiscales")
    if scales:
        # the first of the datasets has the full resolution
        array = group[scales[0]["datasets"][0]["path"]]
        names = [axis["name"] if isinstance(axis, dict) else axis for axis in scales[0]["axes"]]
        return array, "".join(name.upper() if name in ("c", "y", "x") else "N" for name in names)
    arrays = dict(group.arrays())
    if len(arrays) != 1:
        raise ValueError(f"wanted a group of one array, got {len(arrays)}: {', '.join(arrays)}")
    return next(iter(arrays.values())), None


@dataclass(frozen=True)
class _ZarrPage:
    """A page of a Zarr array; a slice reads the chunks that it meets."""

    path: Path
    array: Any
    index: tuple[Any, ...]
    axes: str  # those that ``index`` keeps

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [n for n, i in zip(self.array.shape, self.index, strict=True) if i == slice(None)]
        size = dict(zip(self.axes, sizes, strict=True))
        return size.get("C", 1), size["Y"], size["X"]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype)

    def __getitem__(self, key: slice | tuple[slice, ...]) -> np.ndarray:
        given = key if isinstance(key, tuple) else (key,)
        channels, rows, columns = given + (slice(None),) * (3 - len(given))
        wanted = iter({"Y": rows, "X": columns}.get(axis, slice(None)) for axis in self.axes)
        index = tuple(next(wanted) if i == slice(None) else i for i in self.index)
        with _reading(self.path):
            return _page(self.array, index, self.axes)[channels]


_READERS: dict[str, Callable[[Path], list[_Entry]]] = {
    ".tif": _open_tiff,
    ".tiff": _open_tiff,
    ".png": _open_picture,
    ".jpg": _open_picture,
    ".jpeg": _open_picture,
    ".npy": _open_npy,
    ".zip": _open_zarr,
}
_SUFFIXES = " ".join(_READERS)
