"""The CUDA operators on a GPU: the same bits as on the CPU."""

import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastunet import backends, separate_touching, weight_map

from .test_weight_map import KINDS, random_map


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "no GPU on this machine"
    served = {row.operator: row.backend for row in backends.report() if row.device == "cuda"}
    return "" if served["weight_map"] == "cuda" else "the extension is built without CUDA operators"


WHY_NOT = _why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "never")
SANITIZER = shutil.which("compute-sanitizer")


def labels_of(shape: tuple[int, ...], cells: int, seed: int = 0) -> Tensor:
    """[B, ...] int32, the kinds of maps in turn."""
    rng = np.random.default_rng(seed)
    kinds = [KINDS[image % len(KINDS)] for image in range(shape[0])]
    return torch.from_numpy(np.stack([random_map(kind, shape[1:], cells, rng) for kind in kinds]))


def check(labels: Tensor, **options: Any) -> None:
    assert torch.equal(weight_map(labels.cuda(), **options).cpu(), weight_map(labels, **options))
    ours = weight_map(labels.cuda(), return_distances=True, **options)
    for gpu, cpu in zip(ours, weight_map(labels, return_distances=True, **options), strict=True):
        assert torch.equal(gpu.cpu(), cpu)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 512, 512), (5, 33, 41), (1, 700, 3), (1, 1, 900)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_images(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    labels = labels_of(shape, 40).to(dtype)
    if dtype == torch.int64:
        labels <<= 32
    check(labels)
    check(labels, class_weight=torch.tensor([0.5, 4.0]), spacing=(0.7, 1.3), sigma=2.0)
    check(labels, class_weight=None, separate=2)
    for width in (0, 1, 3, 50):
        carved = separate_touching(labels.cuda(), width)
        assert torch.equal(carved.cpu(), separate_touching(labels, width))


@pytest.mark.parametrize("shape", [(3, 20, 60, 70), (2, 40, 1, 9), (1, 2, 300, 1)])
def test_volumes(shape: tuple[int, ...]) -> None:
    labels = labels_of(shape, 15)
    check(labels, spacing=(1, 1, 1))
    check(labels, spacing=(2.3, 0.7, 1.3), separate=1)


def test_long_lines_and_many_images() -> None:
    """Lines longer than shared memory holds, more images than a grid has rows."""
    check(labels_of((1, 1, 40_000), 99))
    check(labels_of((1, 40_000, 1), 99))
    check(labels_of((1, 3, 4), 2).expand(70_000, 3, 4))


def test_more_bytes_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("less than 40 GB free on this GPU")
    page = labels_of((5, 512, 512), 200)
    many = page.cuda().repeat(900, 1, 1)
    weights = weight_map(many, class_weight=None)
    assert torch.equal(weights[:5].cpu(), weight_map(page, class_weight=None))
    assert torch.equal(weights[-5:], weights[:5])


def test_capture_in_a_graph() -> None:
    """A graph takes nothing that waits for the GPU; it runs on a stream other than the default."""
    labels = labels_of((5, 100, 120), 20).cuda()
    wanted = weight_map(labels, separate=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = weight_map(labels, separate=1)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, wanted)


def test_streams_and_repetition() -> None:
    labels = labels_of((10, 300, 200), 50)
    wanted = weight_map(labels)
    streams = [torch.cuda.Stream() for _ in range(4)]
    gpu = labels.cuda()
    torch.cuda.synchronize()
    results = []
    for number in range(20):
        with torch.cuda.stream(streams[number % 4]):
            results.append(weight_map(gpu))
    torch.cuda.synchronize()
    assert all(torch.equal(result.cpu(), wanted) for result in results)


def test_class_weight_of_another_device() -> None:
    labels = labels_of((1, 1, 4, 5), 2).cuda()
    with pytest.raises(RuntimeError, match="class_weight must be on the device of labels"):
        torch.ops.fastunet.weight_map(labels, torch.ones(2), False, 1.0, 1.0, 1.0, 1.0, 1.0, False)
    weight = torch.ones(2).cuda()
    with pytest.raises(RuntimeError, match="labels must be on the GPU, as class_weight is"):
        torch.ops.fastunet.weight_map(labels.cpu(), weight, False, 1.0, 1.0, 1.0, 1.0, 1.0, False)


@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    code = (
        "import torch, fastunet\n"
        "torch.manual_seed(0)\n"
        "labels = torch.randint(0, 5, (2, 6, 70, 90), device='cuda')\n"
        "for dtype in (torch.int32, torch.int64):\n"
        "    fastunet.weight_map(labels[0].to(dtype), separate=2, return_distances=True)\n"
        "    fastunet.weight_map(labels.to(dtype), spacing=(1, 1, 2), separate=1)\n"
        "torch.cuda.synchronize()\n"
    )
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
