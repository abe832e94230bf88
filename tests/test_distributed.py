"""Several processes learn what one does, stop together, and end when one of them is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

import fastunet.train as train_module
from fastunet import distributed, load_model
from fastunet.augment import Augmentation, augment
from fastunet.checkpoint import load_checkpoint
from fastunet.learner import PartialDropout
from fastunet.report import read_log
from fastunet.sampling import sample_tiles
from fastunet.synthetic import write_cells
from fastunet.train import LAST, LOG, Outcome, fit, train_step

from .sections import section, small_config, small_model

STEPS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small wait for their threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, **options: Any) -> Outcome:
    torch.manual_seed(1)
    config = small_config(steps=STEPS, batch=4, validate_every=10)
    held_out = [section(i) for i in (2, 3, 4)]
    training = [section(0), section(1)]
    return fit(small_model(), training, config, folder, validation=held_out, quiet=True, **options)


def environment(rank: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def process(rank: int, port: int, folder: Path) -> None:
    """One of two: a whole run, and one that a signal to the second process cuts after step 5."""
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    with distributed.joined("cpu"), pytest.MonkeyPatch.context() as patch:
        with pytest.raises(ValueError, match="processes x accumulate, 2 x 3, got 4 tiles"):
            distributed.share(4, 3)
        whole = run(folder / "whole")
        calls = []

        def step_and_signal(*args: Any) -> torch.Tensor:
            calls.append(1)
            if rank == 1 and len(calls) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*args)

        patch.setattr(train_module, "train_step", step_and_signal)
        cut = run(folder / "cut")
    ended = [(outcome.step, outcome.stopped_by) for outcome in (whole, cut)]
    (folder / f"{rank}.json").write_text(json.dumps(ended))


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    spawn(process, (free_port(), tmp_path), nprocs=2)
    for rank in (0, 1):
        ended = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ended == [[STEPS, None], [5, signal.SIGTERM]]
    alone = run(tmp_path / "alone").history
    # the second half of the cut run goes on in one process
    assert run(tmp_path / "cut", resume=True).step == STEPS
    for name in ("whole", "cut"):
        lines = read_log(tmp_path / name / LOG)
        for line, want in zip(lines, alone, strict=True):
            assert line == pytest.approx({**want, "seconds": line["seconds"]}, rel=0, abs=1e-5)
        assert load_checkpoint(tmp_path / name / LAST)[2]["step"] == STEPS
    # a curve that other tiles or other noise would change
    assert len({round(line["loss"], 3) for line in alone if "loss" in line}) > STEPS / 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others(lost: int, tmp_path: Path) -> None:
    images, labels = write_cells(tmp_path, pages=2, size=(96, 96), count=6)
    folder, port = tmp_path / "run", free_port()
    command = [
        sys.executable, "-m", "fastunet", "train", "--images", str(images), "--labels", str(labels),
        "--output", str(folder), "--widths", "4,8,16", "--tile", "60", "--batch", "2", "--device",
        "cpu", "--steps", "1000000", "--validate-every", "5",
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment(rank, port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 120
    while not (folder / LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[lost].kill()
    _, printed = processes[1 - lost].communicate(timeout=60)
    assert processes[lost].wait() == -signal.SIGKILL
    assert (processes[1 - lost].returncode, printed) == (
        2,
        "fastunet: error: train: another of the 2 processes has ended; continue from the last "
        "checkpoint with --resume\n",
    )
    assert load_checkpoint(folder / LAST)[2]["step"] >= 5
    load_model(folder / LAST)


def test_torchrun_starts_and_interrupts(tmp_path: Path) -> None:
    images, labels = write_cells(tmp_path, pages=2, size=(96, 96), count=6)
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(free_port()), "-m", "fastunet", "train", "--images", str(images), "--labels",
        str(labels), "--output", str(folder), "--widths", "4,8,16", "--tile", "60", "--batch", "2",
        "--device", "cpu", "--steps", "1000000",
    ]  # fmt: skip
    torchrun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not read_log(folder / LOG) and time.monotonic() < deadline:
        time.sleep(0.05)
    torchrun.send_signal(signal.SIGINT)
    _, printed = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    step = load_checkpoint(folder / LAST)[2]["step"]
    assert printed.count(f"stopped at step {step}; continue with the same command") == 1
    assert read_log(folder / LOG)[-1]["step"] == step


def test_parts_of_a_batch_are_the_batch() -> None:
    def batch(part: slice) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        images, labels = sample_tiles([section(0), section(1)], 60, 6, 20, generator, part=part)
        drawn = Augmentation(rotation="free")
        return augment(images, labels, drawn, generator, batch=6, part=part)

    whole = batch(slice(0, 6))
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        assert all(torch.equal(a[part], b) for a, b in zip(whole, batch(part), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_of_a_part(layout: torch.memory_format, device: torch.device) -> None:
    x = torch.randn(6, 5, 9, 7, device=device).to(memory_format=layout)
    torch.manual_seed(2)
    whole = torch.nn.Dropout(0.3)(x)
    dropout = PartialDropout(0.3, 6)
    for first, last in ((0, 1), (1, 4), (4, 6)):
        dropout.first = first
        torch.manual_seed(2)
        torch.testing.assert_close(dropout(x[first:last]), whole[first:last])
    assert torch.equal(dropout.eval()(x), x)
