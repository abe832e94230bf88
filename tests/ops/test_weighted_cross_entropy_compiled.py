"""weighted_cross_entropy's kernels, compiled for GPUs that are not there."""

import importlib.util

import pytest
import torch

from .. import aot

THREADS = 128
FORWARD = "_weighted_cross_entropy_fwd_kernel"
BACKWARD = "_weighted_cross_entropy_bwd_kernel"
TOTAL = "_weighted_cross_entropy_total_kernel"
IN_REGISTERS = ("1 float32", "2 float32", "2 float16", "3 bfloat16", "8 bfloat16")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.parametrize("capability", aot.GPUS),
]


def kernels(capability: int) -> list[aot.Compiled]:
    return aot.compiled("tests.ops.launches_weighted_cross_entropy")[capability]


def test_kernels_do_not_spill(capability: int) -> None:
    names = {kernel.kernel for kernel in kernels(capability)}
    assert names == {FORWARD, BACKWARD, TOTAL}
    for kernel in kernels(capability):
        assert kernel.spilled_bytes == 0, kernel.launch
        # so that three programs fit a multiprocessor
        assert kernel.registers <= 168, kernel.launch
        assert kernel.shared_bytes <= aot.SHARED_LIMIT[capability]


def test_no_atomics(capability: int) -> None:
    for kernel in kernels(capability):
        assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"} & set(kernel.sass), kernel.launch


def test_targets_are_asserted(capability: int) -> None:
    for kernel in kernels(capability):
        assert ("__assertfail" in kernel.ptx) == (kernel.kernel != TOTAL)


@pytest.mark.parametrize("launch", IN_REGISTERS)
def test_bytes_of_a_pixel(launch: str, capability: int) -> None:
    """What the docstrings say: logits, int64 target and float32 weight once, 16 bytes a load."""
    classes, dtype = launch.split()
    item_bytes = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    # 16 bytes of logits a thread and class
    pixels = THREADS * 16 // item_bytes
    for kernel in kernels(capability):
        if kernel.launch != launch or kernel.kernel == TOTAL:
            continue
        assert kernel.warps * 32 == THREADS
        loaded = kernel.sass["LDG.128"] * 16 * THREADS / pixels
        assert loaded == int(classes) * item_bytes + 8 + 4
        scalars = 2 if kernel.kernel == BACKWARD else 0
        assert kernel.sass["LDG"] == kernel.sass["LDG.128"] + scalars
        if kernel.kernel == BACKWARD:
            assert kernel.sass["STG"] == kernel.sass["STG.128"] == int(classes)


def test_wide_loads_elsewhere(capability: int) -> None:
    """More classes than registers hold: each of them loaded 16 bytes wide, backward twice."""
    for kernel in kernels(capability):
        if kernel.launch == "64 float32" and kernel.kernel != TOTAL:
            twice = 2 if kernel.kernel == BACKWARD else 1
            assert kernel.sass["LDG.128"] == 4 * twice + 2 + 1
        if kernel.launch == "channels_last" and kernel.kernel == BACKWARD:
            assert kernel.sass["STG"] == kernel.sass["STG.64"]
