"""Whatever ``fastunet train`` is given, one line names the file at fault, and nothing is lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file

import fastunet.train as train_module
from fastunet.checkpoint import load_checkpoint
from fastunet.report import read_log
from fastunet.synthetic import cells
from fastunet.train import BEST, LAST, LOG, train_step

from .test_cli import call

# POSIX only
resource = pytest.importorskip("resource")

Spoil = Callable[[Path, Path], None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images a.png to c.png, and their labels."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder in (images, labels):
        folder.mkdir()
    for seed, stem in enumerate("abc"):
        image, ids = cells(size=(64, 64), count=3, seed=seed)
        Image.fromarray(image).save(images / f"{stem}.png")
        Image.fromarray(ids.astype(np.uint8)).save(labels / f"{stem}.png")
    return images, labels


def arguments(folders: tuple[Path, Path], output: Path, *more: object) -> list[object]:
    return [
        "train", "--images", folders[0], "--labels", folders[1], "--output", output, "--widths",
        "4,8,16", "--tile", "60", "--steps", "4", "--validate-every", "2", "--quiet", *more,
    ]  # fmt: skip


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fastunet: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def truncated_tiff(images: Path, labels: Path) -> None:
    (images / "b.png").unlink()
    tifffile.imwrite(images / "b.tif", np.zeros((64, 64), np.uint8), compression="zlib")
    content = (images / "b.tif").read_bytes()
    (images / "b.tif").write_bytes(content[: len(content) // 2])


def array(page: np.ndarray) -> Spoil:
    def spoil(images: Path, labels: Path) -> None:
        (images / "b.png").unlink()
        tifffile.imwrite(images / "b.tif", page)

    return spoil


def picture(folder: str, page: np.ndarray) -> Spoil:
    def spoil(images: Path, labels: Path) -> None:
        Image.fromarray(page).save(images.parent / folder / "b.png")

    return spoil


def empty_masks(images: Path, labels: Path) -> None:
    for path in labels.iterdir():
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)


def one_more(images: Path, labels: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(images / "odd.png")


def not_a_picture(images: Path, labels: Path) -> None:
    (labels / "b.png").write_text("a note")


NAN = np.full((64, 64), np.nan, np.float32)
SPOILED: dict[str, tuple[Spoil, str]] = {
    "truncated TIFF": (truncated_tiff, "images/b.tif: cannot be read"),
    "complex numbers": (array(np.zeros((64, 64), np.complex64)), "b.tif"),
    "NaN": (array(NAN), "images/b.tif: wanted finite values"),
    "labels of another size": (
        picture("labels", np.zeros((64, 60), np.uint8)),
        "labels/b.png: wanted labels of 64x64 pixels as in images/b.png, got 64x60",
    ),
    "colour among grey": (
        picture("images", np.zeros((64, 64, 3), np.uint8)),
        "images/b.png: wanted 1 channels as in images/a.png, got 3",
    ),
    "an image too many": (one_more, "without a partner: images/odd.png"),
    "empty masks": (empty_masks, "labels: wanted labels, got background (0) alone in 3 pages"),
    "text": (not_a_picture, "labels/b.png: "),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_data(
    name: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILED[name]
    spoil(*folders)
    assert call(*arguments(folders, tmp_path / "run")) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_sections_of_several_sizes_are_trained_on(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in folders:
        Image.fromarray(np.tile(np.array(Image.open(folder / "b.png")), (2, 1))[:90, :50]).save(
            folder / "b.png"
        )
    assert call(*arguments(folders, tmp_path / "run", "--val-sections", "1")) == 0
    assert capsys.readouterr().err == ""


def test_a_run_survives_spoiled_data(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call(*arguments(folders, run)) == 0
    kept = {name: (run / name).read_bytes() for name in (LAST, BEST, LOG)}
    truncated_tiff(*folders)
    capsys.readouterr()
    assert call(*arguments(folders, run, "--resume")) == 2
    assert "images/b.tif: cannot be read" in one_line(capsys)
    assert {name: (run / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(("bytes_left", "full"), [(20_000, BEST), (330, LOG)])
def test_a_full_disk_keeps_the_checkpoint(
    bytes_left: int,
    full: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    longer = ("--steps", "12", "--schedule", "constant")
    assert call(*arguments(folders, whole, *longer)) == 0
    calls = []

    def until_the_fifth(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            fill(bytes_left)
        return train_step(*args)

    with disk() as fill:
        monkeypatch.setattr(train_module, "train_step", until_the_fifth)
        capsys.readouterr()
        assert call(*arguments(folders, run, *longer)) == 2
    assert f"{run / full}: cannot be written: " in one_line(capsys)
    assert load_checkpoint(run / LAST)[2]["step"] == 4
    assert not list(run.glob(".*"))
    # with room again, the run ends as if nothing had been
    assert call(*arguments(folders, run, *longer, "--resume")) == 0
    for name in (LAST, BEST):
        a, b = (load_file(folder / name) for folder in (run, whole))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert [line["step"] for line in read_log(run / LOG)] == list(range(1, 13))


@contextmanager
def disk() -> Iterator[Callable[[int], None]]:
    """A function after which no file grows beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_starts_from_a_checkpoint(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(*arguments(folders, first, "--dropout", "0.25")) == 0
    started = ["train", "--images", folders[0], "--labels", folders[1], "--tile", "60", "--quiet"]
    started += ["--init", first / LAST]
    # a step that changes nothing shows what was started from
    still = [*started, "--output", second, "--steps", "1", "--lr", "1e-30", "--seed", "7"]
    assert call(*still) == 0
    was, now = (load_checkpoint(folder / LAST)[0] for folder in (first, second))
    assert now.config == was.config
    for key, value in was.state_dict().items():
        torch.testing.assert_close(now.state_dict()[key], value)
    capsys.readouterr()
    third = tmp_path / "third"
    for more, message in (
        (["--widths", "4,8"], "--widths and --init do not go together"),
        (["--norm", "none"], "--norm and --init do not go together"),
        (
            ["--label-kind", "classes", "--classes", "4"],
            "last.safetensors: has 2 classes, the data 4",
        ),
        (["--init", tmp_path / "none.safetensors"], "none.safetensors"),
    ):
        assert call(*started, "--output", third, *more) == 2
        assert message in one_line(capsys)
        assert not third.exists()
