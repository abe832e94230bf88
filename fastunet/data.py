"""Sections to train on and to be scored by: image, classes and cells, checked before they are used.

Files are opened by ``fastunet.pages``, which says what a page is.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from skimage.measure import label as components

from .ops import separate_touching
from .pages import DataError, Page, PageSource, open_pages

__all__ = [
    "DataError",
    "LabelKind",
    "Page",
    "PageSource",
    "Section",
    "class_frequencies",
    "load_sections",
    "open_cells",
    "open_pages",
    "page_statistics",
    "parse_sections",
    "standardise",
]

LabelKind = Literal["auto", "classes", "instances"]
_Kind = Literal["classes", "mask", "instances"]

# what a binary mask holds where it does not hold 1
_MASK_VALUES = (255, 65535)


@dataclass(frozen=True)
class Section:
    """One image with its labels.

    ``image`` is [C, H, W] float32, standardised; ``classes`` [H, W] class ids, uint8 (int32 beyond
    256 classes); ``cells`` [H, W] int32, 0 is background and k > 0 the k-th cell.
    """

    name: str
    image: np.ndarray
    classes: np.ndarray
    cells: np.ndarray


def load_sections(
    images: str | Path,
    labels: str | Path,
    *,
    sections: str | None = None,
    n_classes: int = 2,
    label_kind: LabelKind = "auto",
    separate: int = 1,
) -> list[Section]:
    """Read images and their labels, and check everything about them.

    Files pair by name where every name has its partner ("7.png" with "7.tif" or "7_mask.png",
    "_masks", "_label", "_labels", "_seg"), and in order where no name has one.

    Labels are class ids, or the ids of instances, of which touching ones are separated by
    background; the class is then 1 wherever there is one. "auto" decides once for all pages: ids
    below ``n_classes`` are classes, a mask of 0 and 255 (or 65535) is class 1, all else is
    instances. The cells of class ids are their 4-connected components.

    Args:
        images: what ``open_pages`` takes, all pages with as many channels.
        labels: likewise, a page for each image page: integers, bools or whole floats, in one
            channel or in several equal ones. Not JPEG, which does not keep values.
        sections: which pages to return, as ``parse_sections`` takes it; None for all.
        n_classes: number of classes, background included.
        label_kind: "auto", "classes" or "instances".
        separate: how far to carve background between touching instances, as the ``width`` of
            ``separate_touching``; 0 for not at all.
    Returns: the sections in the order of ``sections``.
    Raises: DataError, naming the file, if a file is unreadable, images and labels differ in number
        or size, images differ in channels, an image holds NaN or infinity, labels are not whole
        and non-negative or not below ``n_classes``, or all labels are 0; ValueError for the rest.
    """
    if n_classes < 2:
        raise ValueError(f"load_sections: n_classes must be at least 2, got {n_classes}")
    if label_kind not in get_args(LabelKind):
        raise ValueError(
            f"load_sections: label_kind must be one of {get_args(LabelKind)}, got {label_kind!r}"
        )
    if Path(images).resolve() == Path(labels).resolve():
        raise DataError(f"{images}: wanted images and labels, got one path for both")
    image_pages, label_pages = open_pages(images), open_pages(labels)
    pairs = _pairs(image_pages, label_pages)
    _check_sizes(image_pages, label_pages, pairs)
    chosen = range(len(pairs)) if sections is None else parse_sections(sections, len(pairs))
    ids = [_read_labels(label_pages, j) for _, j in pairs]
    if not any(page.any() for page in ids):
        raise DataError(f"{labels}: wanted labels, got background (0) alone in {len(ids)} pages")
    kind = _kind(ids, n_classes) if label_kind == "auto" else label_kind
    if kind == "instances" and n_classes != 2:
        raise DataError(
            f"{labels}: wanted class ids below {n_classes}, got instance ids, which tell 2 classes"
        )
    result = []
    for number in chosen:
        i, j = pairs[number]
        name = image_pages.name(i)
        image = standardise(image_pages.page(i), name=name)
        cells = _cells(ids[number], kind, separate)
        page = ids[number] if kind == "classes" else cells > 0
        classes = _classes(page, n_classes, label_pages.name(j))
        result.append(Section(name, image, classes, cells))
    return result


def open_cells(
    labels: str | Path, *, label_kind: LabelKind = "auto", separate: int = 1
) -> tuple[PageSource, Iterator[np.ndarray]]:
    """Read labels as cells, one page after the other.

    Args:
        labels: as for ``load_sections``.
        label_kind: as for ``load_sections``; "auto" reads all pages once to decide.
        separate: as for ``load_sections``.
    Returns: the pages, and their cells: [H, W] int32, 0 is background and k > 0 the k-th cell.
    Raises: DataError, naming the file, if it is unreadable or its labels are not whole and
        non-negative; while pages are read, too.
    """
    source = open_pages(labels)

    def pages() -> Iterator[np.ndarray]:
        return (_read_labels(source, i) for i in range(len(source)))

    kind = _kind(pages(), n_classes=2) if label_kind == "auto" else label_kind
    return source, (_cells(page, kind, separate) for page in pages())


def parse_sections(text: str, count: int) -> list[int]:
    """The page numbers that ``text`` means, as in "0-3,7,9-".

    Args:
        text: numbers from 0 and ranges with both ends in them, separated by commas; "24-" goes on
            to the last page.
        count: number of pages.
    Returns: page numbers in the order given, each once.
    Raises: DataError if ``text`` is anything else or names a page that is not there.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:(-)\s*([0-9]*)\s*)?", part)
        first = int(match[1]) if match else count
        last = first if not match or not match[2] else int(match[3] or count - 1)
        if not first <= last < count:
            raise DataError(
                f"sections '{text}': wanted numbers and ranges, as in 0-3,7,9-, "
                f"of the {count} pages 0 to {count - 1}, got '{part.strip()}'"
            )
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def page_statistics(page: Page, *, name: str = "page") -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, read by blocks of rows.

    Args:
        page: [C, H, W], numbers; may be mapped from a file larger than memory.
        name: what messages call the page.
    Returns: mean [C] and standard deviation [C], float64; exactly 0 for a constant channel.
    Raises: DataError if a value is NaN or infinite, or its square overflows.
    Source: Chan, Golub and LeVeque 1979, for adding up the blocks.
    """
    # around any value of the page a constant channel is exactly zero
    origin = np.asarray(page[:, :1, :1]).astype(np.float64)
    count, mean, squares = 0, np.zeros(page.shape[0]), np.zeros(page.shape[0])
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in _row_blocks(page):
            block = np.asarray(page[:, rows]) - origin
            n = block[0].size
            block_mean = block.mean(axis=(1, 2))
            step = block_mean - mean
            squares += ((block - block_mean[:, None, None]) ** 2).sum(axis=(1, 2))
            squares += step**2 * (count * n / (count + n))
            mean += step * (n / (count + n))
            count += n
    if not np.isfinite(squares).all():
        raise DataError(f"{name}: wanted finite values, got NaN, infinity or too large ones")
    return mean + origin[:, 0, 0], np.sqrt(squares / count)


def standardise(page: Page, *, name: str = "page") -> np.ndarray:
    """Shift and scale each channel to mean 0 and standard deviation 1 over the page.

    Args:
        page: [C, H, W], numbers.
        name: what messages call the page.
    Returns: [C, H, W] float32, computed in float64; zeros for a constant channel.
    Raises: DataError if a value is NaN or infinite, or its square overflows.
    """
    mean, std = page_statistics(page, name=name)
    scale = np.where(std > 0, std, 1)
    result = np.empty(page.shape, np.float32)
    for rows in _row_blocks(page):
        result[:, rows] = (np.asarray(page[:, rows]) - mean[:, None, None]) / scale[:, None, None]
    return result


def class_frequencies(sections: Sequence[Section], n_classes: int) -> np.ndarray:
    """The share of each class among the pixels of all sections.

    Args:
        sections: at least one, with class ids below ``n_classes``.
        n_classes: number of classes, background included.
    Returns: [n_classes] float64, of sum 1.
    Raises: ValueError if there are no sections or a class id is not below ``n_classes``.
    """
    if not sections:
        raise ValueError("class_frequencies: sections must be at least one, got none")
    top = max(int(section.classes.max()) for section in sections)
    if top >= n_classes:
        raise ValueError(f"class_frequencies: classes must be below {n_classes}, got {top}")
    counts = np.zeros(n_classes)
    for section in sections:
        counts += np.bincount(section.classes.ravel(), minlength=n_classes)
    return counts / counts.sum()


def _row_blocks(page: Page, values: int = 1 << 20) -> Iterator[slice]:
    """Blocks of whole rows, of about ``values`` values each."""
    channels, height, width = page.shape
    step = max(1, values // (channels * width))
    return (slice(row, row + step) for row in range(0, height, step))


def _pairs(images: PageSource, labels: PageSource) -> list[tuple[int, int]]:
    """Page numbers of each image and its labels."""
    ours, theirs = _by_stem(images), _by_stem(labels)
    if ours.keys() == theirs.keys():
        for stem in ours:
            _check_counts(images, ours[stem], labels, theirs[stem])
        return [pair for stem in ours for pair in zip(ours[stem], theirs[stem], strict=True)]
    if not ours.keys() & theirs.keys():
        _check_counts(images, range(len(images)), labels, range(len(labels)))
        return [(i, i) for i in range(len(images))]
    lonely = [images.name(pages[0]) for stem, pages in ours.items() if stem not in theirs]
    lonely += [labels.name(pages[0]) for stem, pages in theirs.items() if stem not in ours]
    more = ", ..." if len(lonely) > 5 else ""
    raise DataError(
        f"{images.file(0).parent}, {labels.file(0).parent}: wanted an image and a label file "
        f"of each name, got {len(lonely)} without a partner: {', '.join(lonely[:5])}{more}"
    )


def _by_stem(source: PageSource) -> dict[str, list[int]]:
    """The pages of each file, by its name without what tells labels from images."""
    pages: dict[str, list[int]] = {}
    for i in range(len(source)):
        stem = re.sub(
            r"(_(masks?|labels?|seg))?(\.ome)?$", "", source.file(i).stem, flags=re.IGNORECASE
        )
        pages.setdefault(stem, []).append(i)
        other = pages[stem][0]
        if source.file(other) != source.file(i):
            raise DataError(
                f"{source.name(other)} and {source.name(i)}: wanted one file of the name '{stem}'"
            )
    return pages


def _check_counts(
    images: PageSource, of_images: Sequence[int], labels: PageSource, of_labels: Sequence[int]
) -> None:
    if len(of_images) != len(of_labels):
        raise DataError(
            f"wanted labels for each image, got {len(of_images)} image pages from "
            f"{images.name(of_images[0])} on and {len(of_labels)} label pages from "
            f"{labels.name(of_labels[0])} on"
        )


def _check_sizes(images: PageSource, labels: PageSource, pairs: list[tuple[int, int]]) -> None:
    """Raise unless images have the same channels, and each has the size of its labels."""
    first = pairs[0][0]
    for i, j in pairs:
        if images.shape(i)[0] != images.shape(first)[0]:
            raise DataError(
                f"{images.name(i)}: wanted {images.shape(first)[0]} channels as in "
                f"{images.name(first)}, got {images.shape(i)[0]}"
            )
        if images.shape(i)[1:] != labels.shape(j)[1:]:
            raise DataError(
                f"{labels.name(j)}: wanted labels of {_size(images.shape(i))} pixels as in "
                f"{images.name(i)}, got {_size(labels.shape(j))}"
            )


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[2]}"


def _read_labels(source: PageSource, i: int) -> np.ndarray:
    """Page ``i`` as non-negative integers [H, W]."""
    name = source.name(i)
    if source.file(i).suffix.lower() in (".jpg", ".jpeg"):
        raise DataError(f"{name}: wanted labels in a file that keeps values, got JPEG")
    page = np.asarray(source.page(i)[:])
    if (page[1:] != page[:1]).any():
        raise DataError(f"{name}: wanted labels of one channel, got {len(page)} that differ")
    labels = page[0]
    if labels.dtype.kind == "f":
        # beyond 2**53 floats miss whole numbers; NaN equals nothing
        if not (labels == np.trunc(labels)).all() or np.abs(labels).max() > 2**53:
            raise DataError(
                f"{name}: wanted whole numbers as labels, got fractions, NaN or infinity"
            )
        labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise DataError(f"{name}: wanted labels of 0 and above, got {labels.min()}")
    return labels.astype(np.uint8) if labels.dtype.kind == "b" else labels


def _kind(labels: Iterable[np.ndarray], n_classes: int) -> _Kind:
    """What the labels of all pages together are."""
    tops, binary = {0}, True
    for page in labels:
        top = int(page.max())
        tops.add(top)
        binary = binary and bool(np.isin(page, (0, top)).all())
    if max(tops) < n_classes:
        return "classes"
    if max(tops) in _MASK_VALUES and len(tops) == 2 and binary:
        return "mask"
    return "instances"


def _cells(labels: np.ndarray, kind: _Kind, separate: int) -> np.ndarray:
    """Cell ids of a page, int32."""
    if kind == "instances":
        return _separated(labels, separate)
    return components(labels, connectivity=1, background=0).astype(np.int32)


def _classes(ids: np.ndarray, n_classes: int, name: str) -> np.ndarray:
    if ids.max() >= n_classes:
        raise DataError(f"{name}: wanted class ids below {n_classes}, got {ids.max()}")
    return ids.astype(np.uint8 if n_classes <= 256 else np.int32)


def _separated(labels: np.ndarray, width: int) -> np.ndarray:
    """Instance ids as int32, with background carved between those that touch."""
    if labels.max() > np.iinfo(np.int32).max:
        # 0 is among the ids, and so stays 0
        labels = np.searchsorted(np.union1d(labels, labels.dtype.type(0)), labels)
    return separate_touching(labels.astype(np.int32), width=width)
