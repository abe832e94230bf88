"""``fastunet convert``: foreign files become checkpoints, and none of them runs code."""

import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import save_file
from torch import nn

from fastunet import cli, load_model, predict
from fastunet.data import standardise
from fastunet.synthetic import write_cells

from .networks import ClassicUNet, HubUNet, PathUNet


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastunet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


class Code:
    """What a pickle should never be allowed: it makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (ClassicUNet(1, 2, width=4), []),
        (PathUNet(1, 2, 3, 2, padding=True), ["--padding", "same"]),
        (HubUNet(1, 1, 4), []),
    ],
    ids=["padding", "cropping", "named"],
)
def test_converts_and_predicts(
    net: nn.Module, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = write_cells(tmp_path / "data", pages=2, size=(64, 48), count=3)
    torch.save({"state_dict": net.state_dict(), "epoch": 7}, tmp_path / "in.pth")
    output = tmp_path / "out.safetensors"
    assert call("convert", tmp_path / "in.pth", output, *options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(output)
    assert (result["in_channels"], result["padding"]) == (1, "same")

    prediction = tmp_path / "prediction.tif"
    arguments = ["predict", images, "--checkpoint", output, "-o", prediction]
    arguments += ["--device", "cpu", "--quiet"]
    assert call(*arguments) == 0
    page = standardise(tifffile.imread(images)[:1])
    foreground = predict(load_model(output), page)[-1]
    assert np.array_equal(tifffile.imread(prediction)[0], foreground)
    with torch.no_grad():
        y = net.eval()(torch.from_numpy(page)[None])[0]
    original = y if isinstance(net, HubUNet) else y.softmax(0)
    np.testing.assert_array_equal(foreground > 0.5, original[-1].numpy() > 0.5)


def test_plain_safetensors(tmp_path: Path) -> None:
    save_file(HubUNet(1, 1, 4).state_dict(), tmp_path / "in.safetensors")
    output = tmp_path / "new" / "out.safetensors"
    assert call("convert", tmp_path / "in.safetensors", output) == 0
    assert load_model(output).activation == "sigmoid"
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def bad_files(folder: Path, marker: Path) -> dict[str, str]:
    """Files by name, and what is said about each."""
    net = ClassicUNet(1, 2, width=2)
    torch.save({"state_dict": net.state_dict(), "extra": Code(marker)}, folder / "code.pth")
    torch.save(net, folder / "module.pth")
    torch.jit.save(torch.jit.script(nn.Conv2d(1, 1, 3)), folder / "script.pth")
    torch.save(net.state_dict(), folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    for name, share in (("start", 0.001), ("half", 0.5), ("most", 0.99)):
        (folder / f"{name}.pth").write_bytes(whole[: int(len(whole) * share)])
    torch.save(net.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    old = (folder / "old.pth").read_bytes()
    (folder / "old.pth").write_bytes(old[: len(old) // 2])
    (folder / "empty.pth").touch()
    (folder / "text.pth").write_text("hello world\n")
    (folder / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with zipfile.ZipFile(folder / "other.pth", "w") as file:
        file.writestr("readme", "x")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save({"epoch": 3}, folder / "numbers.pth")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "linear.pth")
    (folder / "folder.pth").mkdir()
    damaged = "damaged, or not a file of weights"
    return {
        "code.pth": "would run code (posix.mkdir), which fastunet never does",
        "module.pth": "would run code (tests.networks.ClassicUNet)",
        "script.pth": "would run code (TorchScript)",
        "start.pth": damaged,
        "half.pth": damaged,
        "most.pth": damaged,
        "old.pth": damaged,
        "empty.pth": damaged,
        "text.pth": damaged,
        "half.safetensors": damaged,
        "other.pth": damaged,
        "tensor.pth": "state must be a mapping from keys to tensors",
        "numbers.pth": "state must hold tensors, got epoch",
        "linear.pth": "state must be of a known U-Net, got the keys weight, bias",
        "folder.pth": "Is a directory",
        "nowhere.pth": "no such file",
    }


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX names in messages")
def test_bad_files_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "files", tmp_path / "output" / "out.safetensors"
    folder.mkdir()
    marker = tmp_path / "code-has-run"
    for name, message in bad_files(folder, marker).items():
        assert call("convert", folder / name, output) == 2, name
        printed = capsys.readouterr()
        assert printed.out == "", name
        assert printed.err.startswith(f"fastunet: error: {folder / name}: "), name
        assert printed.err.count("\n") == 1, name
        assert len(printed.err) < 400, name
        assert message in printed.err, name
    assert not marker.exists()
    assert not output.exists()
    # the code is there: without the guard it runs
    torch.load(folder / "code.pth", weights_only=False)
    assert marker.exists()


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(PathUNet(1, 2, 2, 1).state_dict(), source)
    assert call("convert", source, output) == 0
    for arguments, message in (
        ((source, tmp_path / "out.pth"), "the output must end in .safetensors"),
        ((source, output, "--padding", "full"), "Invalid value for '--padding'"),
        ((output, tmp_path / "again.safetensors"), "is a fastunet checkpoint already"),
    ):
        assert call("convert", *arguments) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]
