"""Images and labels become sections, and what cannot be used is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastunet.data import (
    DataError,
    Section,
    class_frequencies,
    load_sections,
    open_pages,
    page_statistics,
    parse_sections,
    standardise,
)

RNG = np.random.default_rng(0)


def grey(pages: int = 3, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    return RNG.integers(0, 256, (pages, *size), dtype=np.uint8)


def touching() -> np.ndarray:
    """Two instances side by side and one apart, ids 1, 2 and 9."""
    labels = np.zeros((20, 24), np.uint16)
    labels[2:8, 2:6], labels[2:8, 6:12], labels[12:18, 3:20] = 1, 2, 9
    return labels


def stack(path: Path, pages: np.ndarray) -> Path:
    tifffile.imwrite(path, pages, photometric="minisblack", compression="zlib")
    return path


def folder(path: Path, pages: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    for name, page in pages.items():
        if name.endswith("png"):
            Image.fromarray(page).save(path / name)
        else:
            stack(path / name, page)
    return path


def load(tmp_path: Path, labels: np.ndarray, **options: Any) -> list[Section]:
    """Sections of random images with ``labels`` [N, H, W]."""
    images = stack(tmp_path / "images.tif", grey(len(labels), labels.shape[1:3]))
    np.save(tmp_path / "labels.npy", labels)
    return load_sections(images, tmp_path / "labels.npy", **options)


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("0-4", [0, 1, 2, 3, 4]),
        ("0-3,7,9-", [0, 1, 2, 3, 7, 9, 10, 11]),
        ("11-", [11]),
        (" 3 , 1 - 2 ", [3, 1, 2]),
        ("5,4-6,5", [5, 4, 6]),
    ],
)
def test_parse_sections(text: str, pages: list[int]) -> None:
    assert parse_sections(text, 12) == pages


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "-",
        "-3",
        "3-1",
        "12",
        "0-12",
        "12-",
        "1,",
        "a",
        "1.5",
        "0--3",
        "1 2",
        "٣",
        "9" * 30,
    ],
)
def test_parse_sections_rejects(text: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_sections(text, 12)
    assert f"'{text}'" in str(caught.value)
    assert "12 pages" in str(caught.value)


def test_standardise() -> None:
    # more than one block of rows, an offset that float32 would not survive
    page = RNG.normal(5, 3, (2, 1030, 600)) + np.array([0, 1e7]).reshape(2, 1, 1)
    mean, std = page_statistics(page)
    exact_mean, exact_std = page.mean(axis=(1, 2)), page.std(axis=(1, 2))
    rounding = np.finfo(np.float64).eps * np.abs(page).max()
    assert np.abs(mean - exact_mean).max() <= rounding
    assert np.abs(std - exact_std).max() <= rounding
    result = standardise(page)
    exact = (page - exact_mean.reshape(2, 1, 1)) / exact_std.reshape(2, 1, 1)
    assert result.dtype == np.float32
    assert np.abs(result - exact).max() <= np.finfo(np.float32).eps * np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["u1", ">u2", "i4", "u8", "f2", "f4", "f8", "?"])
def test_standardise_takes_every_dtype(dtype: str) -> None:
    page = RNG.integers(0, 2, (1, 9, 11)).astype(dtype)
    exact = page.astype(float)
    exact = (exact - exact.mean()) / exact.std()
    assert np.abs(standardise(page) - exact).max() <= np.finfo(np.float32).eps * np.abs(exact).max()


@pytest.mark.parametrize("value", [0, 0.1, -1e-300, 1e300, 65535])
def test_constant_page_gives_zeros(value: float) -> None:
    page = np.full((1, 1001, 1999), value)
    mean, std = page_statistics(page)
    assert (mean[0], std[0]) == (value, 0)
    assert not standardise(page).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 700, 3)])
def test_standardise_rejects(value: float, place: tuple[int, int, int]) -> None:
    page = np.zeros((2, 701, 1000))
    page[place] = value
    with pytest.raises(DataError, match=r"a\.tif page 3: wanted finite values"):
        standardise(page, name="a.tif page 3")


def test_statistics_read_blocks_of_rows(tmp_path: Path) -> None:
    class Watched:
        """A page that notes the size of what is read."""

        def __init__(self) -> None:
            self.array, self.most = np.ones((1, 4000, 1000), np.uint8), 0
            self.shape, self.dtype = self.array.shape, self.array.dtype

        def __getitem__(self, key: object) -> np.ndarray:
            block = self.array[key]  # type: ignore[call-overload]
            self.most = max(self.most, block.size)
            return block

    page = Watched()
    page_statistics(page)
    standardise(page)
    assert page.most <= 2**20


def test_instances(tmp_path: Path) -> None:
    labels = np.stack([touching(), touching().T.reshape(20, 24), touching() * 0])
    plain, carved = load(tmp_path, labels, separate=0), load(tmp_path, labels)
    for section, ids in zip(plain, labels, strict=True):
        assert np.array_equal(section.cells, ids)
    section = carved[0]
    assert section.name == "images.tif page 0"
    assert section.image.shape == (1, 20, 24)
    dtypes = [array.dtype for array in (section.image, section.classes, section.cells)]
    assert dtypes == [np.float32, np.uint8, np.int32]
    assert set(np.unique(section.cells)) == {0, 1, 2, 9}
    assert not section.cells[2:8, 5:7].any()
    assert np.array_equal(section.cells[12:], touching()[12:])
    assert np.array_equal(section.classes, section.cells > 0)


def test_huge_instance_ids(tmp_path: Path) -> None:
    ids = np.array([0, 7, 2**40, 2**63 + 5], np.uint64)
    labels = ids[RNG.integers(0, 4, (1, 20, 24))]
    (section,) = load(tmp_path, labels, separate=0)
    assert np.array_equal(ids[section.cells], labels[0])
    (section,) = load(tmp_path, np.maximum(labels, 7), separate=0)
    assert np.array_equal(ids[section.cells], np.maximum(labels[0], 7))


@pytest.mark.parametrize(
    ("dtype", "top"), [("u1", 255), ("u1", 1), ("?", 1), ("u2", 65535), ("f4", 255), (">i4", 255)]
)
def test_mask(dtype: str, top: int, tmp_path: Path) -> None:
    # a page without cells does not change what the others are
    labels = (np.stack([touching(), touching() * 0]) > 0).astype(dtype) * np.array(top, dtype)
    section, empty = load(tmp_path, labels.astype(dtype))
    assert np.array_equal(section.classes, touching() > 0)
    assert np.array_equal(section.cells, (touching() > 0) + (touching() == 9).astype(int))
    assert not empty.classes.any()


def test_class_ids(tmp_path: Path) -> None:
    labels = np.where(touching() == 9, 1, touching())[None].astype(np.uint8)
    labels[0, 18, 20] = 1  # touches a cell of its class by a corner, and so is another one
    (section,) = load(tmp_path, labels.astype(">u2"), n_classes=3)
    assert np.array_equal(section.classes, labels[0])
    assert section.cells.max() == 4
    assert section.cells[3, 5] != section.cells[3, 6]
    (section,) = load(tmp_path, labels * 100, n_classes=300)
    assert section.classes.dtype == np.int32
    assert section.classes.max() == 200


def test_colour_labels_of_equal_channels(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", {"a.png": grey(1)[0]})
    labels = np.repeat(touching().astype(np.uint8)[..., None], 3, axis=2)
    folder(tmp_path / "labels", {"a.png": labels})
    (section,) = load_sections(images, tmp_path / "labels", separate=0)
    assert np.array_equal(section.cells, touching())


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b1.png", "b10.png"],
        ["a.tif", "b1.tiff", "b10.png"],
        ["a_mask.png", "b1_LABEL.tif", "b10_seg.png"],
        ["a_masks.png", "b1_labels.png", "b10.ome.tif"],
        ["man_seg1.png", "man_seg3.png", "man_seg20.png"],
    ],
)
def test_files_pair(names: list[str], tmp_path: Path) -> None:
    pages = grey(3)
    images = {"b10.png": pages[2], "a.png": pages[0], "b1.png": pages[1]}
    marked = [np.roll(touching(), shift, axis=0) for shift in range(3)]
    labels = folder(tmp_path / "labels", dict(zip(names, marked, strict=True)))
    sections = load_sections(folder(tmp_path / "images", images), labels, separate=0)
    assert [section.name for section in sections] == [
        "images/a.png",
        "images/b1.png",
        "images/b10.png",
    ]
    for section, page, mark in zip(sections, pages, marked, strict=True):
        assert np.array_equal(section.image, standardise(page[None]))
        assert np.array_equal(section.cells, mark)


def test_sections_are_chosen_after_the_kind_is(tmp_path: Path) -> None:
    labels = np.stack([touching() > 5, touching() > 5, touching()]).astype(np.uint8)
    sections = load(tmp_path, labels, sections="1,0")
    assert [section.name for section in sections] == ["images.tif page 1", "images.tif page 0"]
    # instances, though these two pages alone would pass for masks: one cell, not two
    labels[:2, 3, 3] = 1
    assert load(tmp_path, labels, sections="1")[0].cells.max() == 1


def test_class_frequencies() -> None:
    def section(classes: list[list[int]]) -> Section:
        ids = np.array(classes, np.uint8)
        return Section("", np.zeros((1, *ids.shape), np.float32), ids, ids.astype(np.int32))

    sections = [section([[0, 1], [1, 1]]), section([[0, 0, 0, 3]])]
    assert class_frequencies(sections, 4).tolist() == [0.5, 0.375, 0, 0.125]
    with pytest.raises(ValueError, match="classes must be below 3, got 3"):
        class_frequencies(sections, 3)
    with pytest.raises(ValueError, match="at least one"):
        class_frequencies([], 2)


BAD_LABELS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "page 1: wanted labels of 0 and above, got -1": (
        np.stack([touching(), touching() * 0 - 1.0]),
        {},
    ),
    "wanted class ids below 2, got 9": (touching()[None], {"label_kind": "classes"}),
    "wanted class ids below 3, got instance ids": (touching()[None], {"n_classes": 3}),
    "wanted whole numbers .* got fractions": (touching()[None] / 2, {}),
    "wanted whole numbers .* NaN": (np.full((1, 20, 24), np.nan), {}),
    "wanted whole numbers .* infinity": (np.full((1, 20, 24), np.inf), {}),
    "background .* alone in 2 pages": (np.zeros((2, 20, 24), int), {}),
    "n_classes must be at least 2": (touching()[None], {"n_classes": 1}),
    "label_kind must be one of": (touching()[None], {"label_kind": "cells"}),
    "width must be": (touching()[None], {"separate": -1}),
    "sections '1-': .* 1 pages": (touching()[None], {"sections": "1-"}),
}


@pytest.mark.parametrize("message", BAD_LABELS)
def test_bad_labels(message: str, tmp_path: Path) -> None:
    labels, options = BAD_LABELS[message]
    with pytest.raises(ValueError, match=message):
        load(tmp_path, labels, **options)


def test_bad_files(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    folder(images, {f"{stem}.png": page for stem, page in zip("abc", grey(3), strict=True)})
    folder(labels, {f"{stem}.png": touching() for stem in "abc"})
    good = {file: file.read_bytes() for file in [*images.iterdir(), *labels.iterdir()]}

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_sections(images, labels)
        for file in [*images.iterdir(), *labels.iterdir()]:
            file.unlink()
        for file, content in good.items():
            file.write_bytes(content)
        assert len(load_sections(images, labels)) == 3

    (labels / "b.png").unlink()
    refused(r"got 1 without a partner: images/b\.png")
    (labels / "b.png").rename(labels / "q.png")
    refused(r"without a partner: images/b\.png, labels/q\.png")
    for file in (images / "b.png", labels / "c.png"):
        file.write_bytes(good[file][: len(good[file]) // 2])
        refused(f"{file.parent.name}/{file.name}: cannot be read")
    Image.fromarray(touching().T.copy()).save(labels / "c.png")
    refused(r"labels/c\.png: wanted labels of 20x24 pixels as in images/c\.png, got 24x20")
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(images / "c.png")
    refused(r"images/c\.png: wanted 1 channels as in images/a\.png, got 3")
    Image.fromarray(RNG.integers(0, 9, (20, 24, 3), dtype=np.uint8)).save(labels / "b.png")
    refused(r"labels/b\.png: wanted labels of one channel, got 3 that differ")
    stack(labels / "b_mask.tif", touching())
    refused(r"labels/b\.png and labels/b_mask\.tif: wanted one file")
    (labels / "b.png").rename(labels / "b.jpg")
    refused(r"labels/b\.jpg: wanted labels in a file that keeps values")
    tifffile.imwrite(images / "c.tif", np.full((20, 24), np.nan))
    (images / "c.png").unlink()
    refused(r"images/c\.tif: wanted finite values")


def test_counts_differ(tmp_path: Path) -> None:
    images = stack(tmp_path / "images.tif", grey(3))
    labels = stack(tmp_path / "labels.tif", np.stack([touching()] * 2))
    with pytest.raises(DataError, match=r"3 image pages from images\.tif .* 2 label pages"):
        load_sections(images, labels)
    stacks = folder(tmp_path / "a", {"s.tif": grey(3)}), folder(tmp_path / "b", {"s.tif": grey(2)})
    with pytest.raises(DataError, match=r"3 image pages from a/s\.tif .* 2 label pages from b/s"):
        load_sections(*stacks)
    with pytest.raises(DataError, match=r"images\.tif: .*one path for both"):
        load_sections(images, str(images))


def test_em_sections(em_folder: Path) -> None:
    files = em_folder / "train-volume.tif", em_folder / "train-labels.tif"
    sections = load_sections(*files, sections="24-29")
    assert [section.name for section in sections] == [
        f"train-volume.tif page {page}" for page in range(24, 30)
    ]
    truth = open_pages(files[1]).page(29)[0]
    assert np.array_equal(sections[-1].classes, truth == 255)
    assert np.array_equal(sections[-1].cells > 0, truth == 255)
    assert sections[-1].cells.max() > 50


def test_touching_nuclei(nuclei_folder: Path) -> None:
    paths = nuclei_folder / "images", nuclei_folder / "labels"
    sections = load_sections(*paths, sections="0-19")
    assert sections[9].name == "images/010.png"
    for section in sections:
        # no two nuclei touch any longer
        for a, b in (
            (section.cells[1:], section.cells[:-1]),
            (section.cells[:, 1:], section.cells[:, :-1]),
            (section.cells[1:, 1:], section.cells[:-1, :-1]),
            (section.cells[1:, :-1], section.cells[:-1, 1:]),
        ):
            assert not ((a != b) & (a > 0) & (b > 0)).any()
    whole = load_sections(*paths, sections="0-19", separate=0)
    carved, uncarved = class_frequencies(sections, 2), class_frequencies(whole, 2)
    assert 0.9 * uncarved[1] < carved[1] < uncarved[1]
