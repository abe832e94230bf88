"""Checkpoints give back what went in, and damaged ones say so."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastunet import load_model
from fastunet.checkpoint import (
    CheckpointError,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from fastunet.files import replacing

from .sections import small_model


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.1})],
)
def test_round_trip(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], tmp_path: Path
) -> None:
    model = small_model()
    optimizer = kind(model.parameters(), **options)
    model(torch.randn(1, 1, 44, 44)).sum().backward()
    optimizer.step()
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model, optimizer, {"step": 3})
    again, tensors, state = load_checkpoint(path)
    assert state == {"step": 3}
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    fresh = kind(again.parameters(), **options)
    restore_optimizer(fresh, tensors)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        a, b = optimizer.state[p], fresh.state[q]
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name])
            assert a[name].stride() == b[name].stride()


def test_load_model_evaluates(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, small_model())
    model = load_model(str(path))
    assert not model.training
    # as the umask says, not for the writer alone
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, small_model())
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(20):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
            load_model(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: no such checkpoint"):
        load_model(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be read|no such"):
        load_model(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a fastunet checkpoint"):
        load_model(path)


def test_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
