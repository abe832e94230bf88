"""conv_softmax's kernel, compiled for GPUs that are not there."""

import importlib.util

import pytest

from .. import aot
from .launches_conv_softmax import LAUNCHES, PROBABILITIES

# the matrix products of each generation, in the machine code; more than 64 classes leave a program
# fewer pixels than the later ones take
PRODUCTS = {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.parametrize("capability", aot.GPUS),
]


def kernels(capability: int) -> list[aot.Compiled]:
    return aot.compiled("tests.ops.launches_conv_softmax")[capability]


def test_kernels_fit(capability: int) -> None:
    assert [kernel.launch for kernel in kernels(capability)] == list(LAUNCHES)
    for kernel in kernels(capability):
        assert kernel.spilled_bytes == 0, kernel.launch
        assert not {"LDL", "STL"} & kernel.sass.keys(), kernel.launch
        # so that three programs fit a multiprocessor: one computes while others wait for images
        assert kernel.registers <= 168 or "odd" in kernel.launch, kernel.launch
        assert kernel.shared_bytes <= aot.SHARED_LIMIT[capability] // 3, kernel.launch
        assert "tt.atomic" not in kernel.ttgir, kernel.launch


def test_products_run_on_tensor_cores(capability: int) -> None:
    for kernel in kernels(capability):
        # those of float32 would round their operands to TF32
        lower = "float32" not in kernel.launch
        assert bool(PRODUCTS[capability] & kernel.sass.keys()) == lower, kernel.launch


def test_accesses_are_wide(capability: int) -> None:
    """16 bytes at a time images are read and planes of probabilities written."""
    for kernel in kernels(capability):
        if "odd" in kernel.launch:
            continue
        wide = [kernel.sass.get(name, 0) for name in ("LDG.128", "LDGSTS.128")]
        assert sum(wide) > 0, kernel.launch
        # copies to shared memory are of images and weights alone
        assert kernel.sass.get("LDGSTS", 0) == wide[1], kernel.launch
        if kernel.launch.endswith(PROBABILITIES):
            assert kernel.sass["STG"] == kernel.sass["STG.128"], kernel.launch
