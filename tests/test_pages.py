"""Files of every kind give their pages; damaged and hostile ones DataError and nothing else."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from fastunet import pages
from fastunet.pages import DataError, open_pages

zarr: Any = pytest.importorskip("zarr", reason="zarr is not installed")

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 37, 41), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 37, 41), dtype=np.uint16)
PAIRED = np.stack([DEEP, DEEP[::-1]], 1)  # [N, C, H, W]
COLOUR = GREY[:3].transpose(1, 2, 0).copy()  # [H, W, C]
ALPHA = GREY[:4].transpose(1, 2, 0).copy()

Write = Callable[[Path], object]


def tiff(array: np.ndarray, photometric: str = "minisblack", **options: Any) -> Write:
    return lambda path: tifffile.imwrite(path, array, photometric=photometric, **options)


def tiff_apart(pages: Iterable[np.ndarray], **options: Any) -> Write:
    """Each page behind its own directory, as most writers have it."""

    def write(path: Path) -> None:
        with tifffile.TiffWriter(path) as file:
            for page in pages:
                file.write(page, contiguous=False, metadata=None, **options)

    return write


def picture(array: np.ndarray, **options: Any) -> Write:
    return lambda path: Image.fromarray(array).save(path, **options)


def pictures(stack: np.ndarray, **options: Any) -> Write:
    first, *rest = [Image.fromarray(page) for page in stack]
    return lambda path: first.save(path, save_all=True, append_images=rest, **options)


def palette(indices: np.ndarray, colours: list[int]) -> Write:
    image = Image.fromarray(indices, mode="L")
    image.putpalette(colours)
    return lambda path: image.save(path)


def zarr_group(*arrays: Any) -> Write:
    return lambda path: zarr.save_group(str(path), *arrays)


def zarr_array(array: Any) -> Write:
    return lambda path: zarr.save(str(path), array)


def zarr_zip(array: np.ndarray) -> Write:
    def write(path: Path) -> None:
        with zarr.storage.ZipStore(str(path), mode="w") as store:
            zarr.create_array(store, data=array)

    return write


def ome_zarr(array: np.ndarray, axes: str) -> Write:
    def write(path: Path) -> None:
        group = zarr.open_group(str(path), mode="w")
        names = [{"name": axis} for axis in axes]
        paths = [{"path": "full"}, {"path": "half"}]
        group.attrs["ome"] = {"multiscales": [{"axes": names, "datasets": paths}]}
        group.create_array("full", data=array)
        group.create_array("half", data=array[..., ::2, ::2])

    return write


def png16(array: np.ndarray) -> Write:
    return lambda path: path.write_bytes(imagecodecs.png_encode(array))


STACKS: dict[str, tuple[Write, np.ndarray]] = {
    "plain.tif": (tiff(GREY), GREY),
    "one.TIFF": (tiff(DEEP[0]), DEEP[:1]),
    "deflate.tif": (tiff(GREY, compression="zlib", rowsperstrip=5), GREY),
    "lzw.tif": (tiff(DEEP, compression="lzw", predictor=True), DEEP),
    "tiles.tif": (tiff(DEEP, compression="zstd", tile=(16, 16)), DEEP),
    "float.tif": (tiff(DEEP.astype("f4")), DEEP.astype("f4")),
    "bool.tif": (tiff(GREY > 99), GREY > 99),
    "bigendian.tif": (tiff(DEEP, byteorder=">"), DEEP),
    "bigtiff.tif": (tiff(DEEP, bigtiff=True, compression="zlib"), DEEP),
    "apart.tif": (tiff_apart(DEEP), DEEP),
    "colour.tif": (tiff(COLOUR, "rgb"), GREY[None, :3]),
    "planar.tif": (tiff(GREY[:3], "rgb", compression="zlib"), GREY[None, :3]),
    "alpha.tif": (tiff(ALPHA, "rgb", extrasamples=["unassalpha"]), GREY[None, :3]),
    "imagej.tif": (tiff(PAIRED, imagej=True, metadata={"axes": "ZCYX"}), PAIRED),
    "zc.ome.tif": (tiff(PAIRED, compression="zlib", metadata={"axes": "ZCYX"}), PAIRED),
    "cz.ome.tif": (tiff(PAIRED.swapaxes(0, 1), metadata={"axes": "CZYX"}), PAIRED),
    "tz.ome.tif": (tiff(PAIRED, metadata={"axes": "TZYX"}), PAIRED.reshape(10, 37, 41)),
    "libtiff.tif": (pictures(GREY, compression="tiff_lzw"), GREY),
    "libtiff-colour.tif": (picture(COLOUR, compression="tiff_adobe_deflate"), GREY[None, :3]),
    "pillow.tif": (pictures(GREY), GREY),
    "grey.png": (picture(GREY[0]), GREY[:1]),
    "deep.png": (picture(DEEP[0]), DEEP[:1]),
    "bits.png": (picture(GREY[0] > 99), GREY[:1] > 99),
    "colour.png": (picture(COLOUR), GREY[None, :3]),
    "alpha.png": (picture(ALPHA), GREY[None, :3]),
    "deep-colour.png": (png16(DEEP[:3].transpose(1, 2, 0).copy()), DEEP[None, :3]),
    "classes.png": (palette(GREY[0] % 3, [0, 0, 0, 255, 0, 0, 0, 9, 255]), GREY[:1] % 3),
    "greys.png": (palette(GREY[0] % 2, [255, 255, 255, 0, 0, 0]), 255 - 255 * (GREY[:1] % 2)),
    "stack.npy": (lambda path: np.save(path, DEEP), DEEP),
    "flat.npy": (lambda path: np.save(path, DEEP[0].astype(float)), DEEP[:1].astype(float)),
    "fortran.npy": (lambda path: np.save(path, np.asfortranarray(PAIRED)), PAIRED),
    "stack.zarr": (zarr_array(DEEP), DEEP),
    "channels.zip": (zarr_zip(PAIRED), PAIRED),
    "group.zarr": (zarr_group(DEEP[0]), DEEP[:1]),
    "ome.zarr": (ome_zarr(PAIRED, "zcyx"), PAIRED),
    "czyx.zarr": (ome_zarr(PAIRED.swapaxes(0, 1), "czyx"), PAIRED),
}


def read(path: Path) -> list[np.ndarray]:
    source = open_pages(path)
    return [np.asarray(source.page(i)[:]) for i in range(len(source))]


@pytest.mark.parametrize("name", STACKS)
def test_reads_what_was_written(name: str, tmp_path: Path) -> None:
    write, stack = STACKS[name]
    write(tmp_path / name)
    source = open_pages(tmp_path / name)
    wanted = [page.reshape(-1, *page.shape[-2:]) for page in stack]
    assert len(source) == len(wanted)
    for i, want in enumerate(wanted):
        page = source.page(i)
        assert source.shape(i) == page.shape == want.shape
        assert source.dtype(i) == page.dtype
        assert source.dtype(i).newbyteorder("=") == want.dtype
        assert source.name(i) == (name if len(wanted) == 1 else f"{name} page {i}")
        assert np.array_equal(page[:], want)
        assert np.array_equal(page[:, 5:17, 8:30], want[:, 5:17, 8:30])
        assert np.array_equal(page[:1, 30:], want[:1, 30:])


def test_pages_of_one_tiff_differ_in_size(tmp_path: Path) -> None:
    pages = [GREY[0], GREY[1, :20], GREY[2, :, :9]]
    tiff_apart(pages, compression="zlib")(tmp_path / "sizes.tif")
    for got, want in zip(read(tmp_path / "sizes.tif"), pages, strict=True):
        assert np.array_equal(got, want[None])


def test_folder_in_natural_order(tmp_path: Path) -> None:
    for number, page in ((10, GREY[0]), (9, GREY[1])):
        Image.fromarray(page).save(tmp_path / f"{number}.png")
    tifffile.imwrite(tmp_path / "A2.tif", GREY[2:4], photometric="minisblack")
    for other in ("notes.txt", ".hidden.png"):
        (tmp_path / other).write_text("not an image")
    source = open_pages(str(tmp_path))
    folder = tmp_path.name
    names = ["9.png", "10.png", "A2.tif page 0", "A2.tif page 1"]
    assert [source.name(i) for i in range(4)] == [f"{folder}/{name}" for name in names]
    assert [source.file(i).name for i in range(4)] == ["9.png", "10.png", "A2.tif", "A2.tif"]
    assert np.array_equal(np.concatenate(read(tmp_path)), GREY[[1, 0, 2, 3]])


@pytest.mark.parametrize("name", ["plain.tif", "apart.tif", "cz.ome.tif", "stack.npy"])
def test_pages_are_mapped(name: str, tmp_path: Path) -> None:
    STACKS[name][0](tmp_path / name)
    assert isinstance(open_pages(tmp_path / name).page(1), np.memmap)


def test_zarr_reads_only_the_chunks_it_meets(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    array = zarr.create_array(str(path), shape=(2, 64, 64), chunks=(1, 32, 32), dtype="u2")
    array[:] = 7
    (path / "c" / "1" / "0" / "0").write_bytes(b"not a chunk")
    page = open_pages(path).page(1)
    assert (page[:, 32:, :] == 7).all()
    with pytest.raises(DataError, match=r"a\.zarr: cannot be read"):
        page[:, 31:, :]


@pytest.mark.parametrize("name", [name for name in STACKS if not name.endswith(".zarr")])
def test_truncated_is_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    STACKS[name][0](path)
    whole, content = read(path), path.read_bytes()
    cuts = RNG.integers(0, len(content), 60)
    messages = []
    for cut in {0, 1, *map(int, cuts), *range(len(content) - 24, len(content))}:
        path.write_bytes(content[:cut])
        try:
            pages = read(path)
        except DataError as error:
            messages.append(str(error))
        else:
            # the cut took nothing but what follows the last pixel
            assert all(np.array_equal(a, b) for a, b in zip(pages, whole, strict=True))
    assert len(messages) > 50
    assert all(name in message for message in messages)


HOSTILE: dict[str, Write] = {
    "text.png": lambda path: path.write_text("not an image"),
    "text.tif": lambda path: path.write_text("not an image"),
    "text.npy": lambda path: path.write_text("not an array"),
    "text.zip": lambda path: path.write_text("not an archive"),
    "empty.tif": lambda path: path.write_bytes(b""),
    "tiff.png": lambda path: tifffile.imwrite(path, GREY[0]),
    "png.tif": lambda path: Image.fromarray(GREY[0]).save(path, format="png"),
    "header.tif": lambda path: path.write_bytes(b"II*\0\0\0\0\0"),
    "complex.tif": tiff(GREY.astype("c8")),
    "complex.npy": lambda path: np.save(path, GREY.astype(complex)),
    "object.npy": lambda path: np.save(path, np.array([[{}]]), allow_pickle=True),
    "text-array.npy": lambda path: np.save(path, np.array([["a"]])),
    "nothing.npy": lambda path: np.save(path, np.zeros((0, 4, 4))),
    "no-rows.npy": lambda path: np.save(path, np.zeros((3, 0, 4))),
    "line.npy": lambda path: np.save(path, np.zeros(4)),
    "five.npy": lambda path: np.save(path, np.zeros((1, 1, 1, 4, 4))),
    "channels-last.npy": lambda path: np.save(path, COLOUR),
    "folder.zarr": Path.mkdir,
    "two.zarr": zarr_group(GREY, DEEP),
    "complex.zarr": zarr_array(GREY.astype(complex)),
    "folder": Path.mkdir,
    "image.bmp": picture(GREY[0]),
    "missing.tif": lambda path: None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_is_an_error(name: str, tmp_path: Path) -> None:
    HOSTILE[name](tmp_path / name)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    Image.fromarray(GREY[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    with pytest.raises(DataError, match=r"b\.png"):
        open_pages(tmp_path)


def test_without_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(DataError, match=r"a\.zarr: .*pip install 'fastunet\[zarr\]'"):
        open_pages(tmp_path / "a.zarr")


def test_a_reason_of_one_word_is_explained() -> None:
    want = r"a\.tif: cannot be read: it seems damaged \(KeyError: 0\)"
    with pytest.raises(DataError, match=want), pages._reading("a.tif"):
        raise KeyError(0)
