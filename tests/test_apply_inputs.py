"""What ``predict`` and ``evaluate`` cannot use, one line names; nothing half-written stays."""

import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file

from fastunet import UNet
from fastunet.checkpoint import save_checkpoint
from fastunet.pages import PageSource

from .sections import small_model
from .test_cli import call
from .test_training_inputs import (
    NAN,
    SPOILED,
    Spoil,
    array,
    disk,
    folders,
    one_line,
    truncated_tiff,
)

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["folders"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, small_model())
    return path


def predict(folders: tuple[Path, Path], checkpoint: Path, *more: object) -> int:
    output = folders[0].parent / "out" / "p.tif"
    return call("predict", folders[0], "--checkpoint", checkpoint, "-o", output, "--quiet", *more)


def evaluate(folders: tuple[Path, Path], checkpoint: Path, *more: object) -> int:
    both = ("--images", folders[0], "--labels", folders[1])
    return call("evaluate", *both, "--checkpoint", checkpoint, *more)


def nothing_written(folder: Path) -> bool:
    return not list(folder.glob("out/*")) and not list(folder.glob("**/.*"))


@pytest.mark.parametrize("name", SPOILED)
def test_evaluate_of_spoiled_data(
    name: str, folders: tuple[Path, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILED[name]
    spoil(*folders)
    assert evaluate(folders, checkpoint, "--json") == 2
    assert message in one_line(capsys)


def written(text: str) -> Spoil:
    def spoil(images: Path, labels: Path) -> None:
        (images / "b.png").write_text(text)

    return spoil


SPOILED_IMAGES: dict[str, tuple[Spoil, str]] = {
    name: (spoil, message)
    for name, (spoil, message) in SPOILED.items()
    if name in ("truncated TIFF", "complex numbers", "NaN")
}
SPOILED_IMAGES["colour among grey"] = (
    SPOILED["colour among grey"][0],
    "images/b.png must have 1 channels as the network takes, got 3",
)
SPOILED_IMAGES["text"] = (written("a note"), "images/b.png: cannot be read")
SPOILED_IMAGES["an empty file"] = (written(""), "images/b.png: the file is empty")
SPOILED_IMAGES["infinity"] = (array(NAN + np.inf), "images/b.tif: wanted finite values")


@pytest.mark.parametrize("kind", ["probability", "instances"])
@pytest.mark.parametrize("name", SPOILED_IMAGES)
def test_predict_of_spoiled_images(
    name: str,
    kind: str,
    folders: tuple[Path, Path],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, message = SPOILED_IMAGES[name]
    spoil(*folders)
    assert predict(folders, checkpoint, "--kind", kind) == 2
    assert message in one_line(capsys)
    assert nothing_written(folders[0].parent)


def test_damage_within_pixels(
    folders: tuple[Path, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that opens and whose pixels cannot be decoded, after a page has been predicted."""
    path = folders[0] / "b.tif"
    (folders[0] / "b.png").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    tifffile.imwrite(path, noise, compression="zlib")
    with tifffile.TiffFile(path) as file:
        start = file.pages.first.dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert predict(folders, checkpoint) == 2
    assert "images/b.tif: cannot be read" in one_line(capsys)
    assert nothing_written(folders[0].parent)


def test_other_files_and_sizes_are_taken(
    folders: tuple[Path, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in folders:
        (folder / "notes.txt").write_text("a note")
        Image.fromarray(np.array(Image.open(folder / "b.png"))[:50, :33]).save(folder / "b.png")
    assert predict(folders, checkpoint, "--kind", "instances") == 0
    with tifffile.TiffFile(folders[0].parent / "out" / "p.tif") as file:
        assert [series.shape for series in file.series] == [(64, 64), (50, 33), (64, 64)]
    assert evaluate(folders, checkpoint, "--json") == 0
    assert capsys.readouterr().err == ""


def other_weights(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def pickled(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def cut_short(path: Path) -> None:
    save_checkpoint(path, small_model())
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [other_weights, pickled, cut_short, Path.mkdir, Path.touch, None])
@pytest.mark.parametrize("command", [predict, evaluate])
def test_wrong_checkpoints(
    command: Any,
    spoil: Any,
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "wrong.safetensors"
    if spoil:
        spoil(path)
    assert command(folders, path) == 2
    assert f"{path}: " in one_line(capsys)
    assert nothing_written(tmp_path)


def written_with(path: Path, **options: Any) -> Path:
    save_checkpoint(path, UNet(**{"widths": (2, 3, 4), **options}))
    return path


@pytest.mark.parametrize("command", [predict, evaluate])
def test_checkpoints_that_do_not_fit_together(
    command: Any,
    folders: tuple[Path, Path],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    narrow = written_with(tmp_path / "narrow.safetensors")
    classes = written_with(tmp_path / "classes.safetensors", n_classes=3)
    same = written_with(tmp_path / "same.safetensors", padding="same")
    text, missing = tmp_path / "text.safetensors", tmp_path / "missing.safetensors"
    text.write_text("a note")
    again = tmp_path / "again.safetensors"
    again.symlink_to(checkpoint)
    for path, message in (
        (classes, f"{classes}: has 3 classes, {checkpoint} 2"),
        (same, f"{same}: has padding same, {checkpoint} valid"),
        (missing, f"{missing}: no such checkpoint"),
        (text, f"{text}: cannot be read as a checkpoint"),
        (checkpoint, f"{checkpoint}: is given as a checkpoint twice"),
        (again, f"{again}: is given as a checkpoint twice"),
    ):
        # in the middle and at the end
        for more in ((path, narrow), (narrow, path)):
            options = [part for other in more for part in ("--checkpoint", other)]
            assert command(folders, checkpoint, *options) == 2
            assert one_line(capsys).startswith(f"fastunet: error: {message}")
            assert nothing_written(tmp_path)


@pytest.mark.parametrize("kind", ["probability", "label", "instances"])
def test_a_full_disk_keeps_the_old_file(
    kind: str,
    folders: tuple[Path, Path],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = folders[0].parent / "out" / "p.tif"
    assert predict(folders, checkpoint) == 0
    old = output.read_bytes()
    capsys.readouterr()
    with disk() as fill:
        fill(10_000)
        status = predict(folders, checkpoint, "--kind", kind)
    assert status == 2
    assert f"{output}: cannot be written: " in one_line(capsys)
    assert output.read_bytes() == old
    assert [file.name for file in output.parent.iterdir()] == ["p.tif"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [predict, evaluate])
def test_signals(
    command: Any,
    number: int,
    folders: tuple[Path, Path],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = PageSource.page

    def page_and_signal(self: PageSource, i: int) -> Any:
        if i == 1:
            os.kill(os.getpid(), number)
        return read(self, i)

    before = signal.getsignal(number)
    monkeypatch.setattr(PageSource, "page", page_and_signal)
    assert command(folders, checkpoint) == 128 + number
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "fastunet: interrupted\n"
    assert nothing_written(folders[0].parent)
    assert signal.getsignal(number) == before


def test_the_old_file_survives_damage(
    folders: tuple[Path, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(folders, checkpoint) == 0
    output = folders[0].parent / "out" / "p.tif"
    old = output.read_bytes()
    truncated_tiff(*folders)
    capsys.readouterr()
    assert predict(folders, checkpoint) == 2
    assert "images/b.tif: cannot be read" in one_line(capsys)
    assert output.read_bytes() == old
    assert [file.name for file in output.parent.iterdir()] == ["p.tif"]


def test_border_class_is_checked_before_the_first_page(
    folders: tuple[Path, Path],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(import_module("fastunet.predict"), "_fill")
    more = ("--kind", "instances", "--border-class", 2)
    assert predict(folders, checkpoint, *more) == 2
    assert "border_class must be of three classes or more" in one_line(capsys)
    assert nothing_written(folders[0].parent)
