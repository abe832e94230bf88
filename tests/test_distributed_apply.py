"""Several processes predict and score what one does, bit for bit, and one of them speaks."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch.multiprocessing.spawn import spawn

from fastunet import distributed
from fastunet.checkpoint import save_checkpoint
from fastunet.pages import PageSource
from fastunet.synthetic import write_cells

from .sections import small_model
from .test_cli import call
from .test_distributed import environment, free_port

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("probability", "label", "instances")


def commands(folder: Path, output: Path) -> dict[str, list[object]]:
    """Calls of the command line by name; those from "bad" on fail."""
    images, labels, checkpoint = (
        folder / "images.tif",
        folder / "labels.tif",
        folder / "m.safetensors",
    )
    of = ["--checkpoint", checkpoint, "--device", "cpu"]
    evaluate = ["evaluate", "--images", images, "--labels", labels, "--json"]
    calls: dict[str, list[object]] = {
        kind: [
            "predict",
            images,
            *of,
            "-o",
            output / f"{kind}.tif",
            "--kind",
            kind,
            "--overlay",
            output / kind,
        ]
        for kind in KINDS
    }
    calls["one page"] = ["predict", folder / "one.tif", *of, "-o", output / "one.tif"]
    calls["scores"] = [*evaluate, *of]
    calls["bad checkpoint"] = [*evaluate, "--checkpoint", images, "--device", "cpu"]
    calls["bad option"] = ["predict", images, *of, "--tile", "many"]
    calls["bad tile"] = ["predict", images, *of, "--tile", "61", "-o", output / "bad.tif"]
    # of two processes the second finds it
    calls["bad page"] = ["predict", folder / "nan.tif", *of, "-o", output / "bad.tif"]
    calls["bad disk"] = ["predict", images, *of, "-o", folder / "images.tif" / "bad.tif"]
    return calls


def captured(arguments: list[object]) -> tuple[int, str, str]:
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        status = call(*arguments)
    return status, printed.getvalue(), told.getvalue()


def process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    output = folder / "two"
    results = {}
    for i, (name, arguments) in enumerate(commands(folder, output).items()):
        os.environ.update(environment(rank, port + i))
        results[name] = captured(arguments)
    (folder / f"{rank}.json").write_text(json.dumps(results))


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    images, _ = write_cells(tmp_path, pages=3, size=(96, 96), count=6)
    assert images == tmp_path / "images.tif"
    pages = tifffile.imread(images)
    tifffile.imwrite(tmp_path / "one.tif", pages[0])
    pages = pages.astype(np.float32)
    pages[1, 5, 5] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", pages, photometric="minisblack")
    save_checkpoint(tmp_path / "m.safetensors", small_model())
    spawn(process, (free_port(), tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name, arguments in commands(tmp_path, tmp_path / "one").items():
        status, printed, told = captured(arguments)
        assert status == (2 if name.startswith("bad") else 0), told
        assert told.count("\n") == (status == 2)
        one, two = str(tmp_path / "one") + os.sep, str(tmp_path / "two") + os.sep
        assert first[name] == [status, printed.replace(one, two), told.replace(one, two)], name
        assert second[name] == [0, "", ""], name
    written = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")}
    assert written == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")}
    files = [path for path in written if path.suffix]
    assert len(files) == 4 + 3 * 3
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), (
            path
        )


def lost(rank: int, port: int, folder: Path) -> None:
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    read = PageSource.page

    def page(self: PageSource, i: int) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, i)

    with pytest.MonkeyPatch.context() as patch, (folder / "told.txt").open("w") as told:
        patch.setattr(PageSource, "page", page)
        patch.setattr(sys, "stderr", told)
        call(*commands(folder, folder)["label"])


def test_a_lost_process_leaves_no_file(tmp_path: Path) -> None:
    write_cells(tmp_path, pages=3, size=(96, 96), count=6)
    save_checkpoint(tmp_path / "m.safetensors", small_model())
    context = torch.multiprocessing.get_context("spawn")
    port = free_port()
    processes = [context.Process(target=lost, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(60)
    assert [one.exitcode for one in processes] == [2, -signal.SIGKILL]
    assert (tmp_path / "told.txt").read_text() == (
        "fastunet: error: predict: another of the 2 processes has ended; run the command again\n"
    )
    assert not list(tmp_path.glob("label.tif"))
    assert not list(tmp_path.glob(".*"))


def test_torchrun_tells_a_mistake_once(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(free_port()), "-m", "fastunet", "predict", str(tmp_path / "no.tif"), "--checkpoint",
        str(tmp_path / "no.safetensors"), "--device", "cpu",
    ]  # fmt: skip
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert ended.returncode != 0
    assert ended.stderr.count("fastunet: error: ") == 1
    assert f"fastunet: error: {tmp_path / 'no.tif'}: no such file or folder" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_alone_nothing_is_dealt() -> None:
    assert distributed.dealt(lambda i: i * i, 4) == [0, 1, 4, 9]
    assert distributed.from_first(lambda: "told") == "told"
    with pytest.raises(ZeroDivisionError):
        distributed.agree(lambda: 1 // 0)
