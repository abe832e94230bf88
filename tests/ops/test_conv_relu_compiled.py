"""The convolution's kernels, compiled for GPUs that are not there, as their tiles promise."""

import importlib.util
import sys

import pytest

from ..aot import GPUS, SHARED_LIMIT, Compiled, compiled, table

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

LAUNCHES = "tests.ops.launches_conv_relu"
# the matrix product of each generation, in the machine code
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(params=GPUS)
def kernels(request: pytest.FixtureRequest) -> tuple[int, list[Compiled]]:
    return request.param, compiled(LAUNCHES)[request.param]


def test_kernels_fit(kernels: tuple[int, list[Compiled]]) -> None:
    capability, found = kernels
    sys.stdout.write(f"\nsm_{capability}\n{table(found, (PRODUCTS[capability], 'UTMALDG'))}\n")
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel.launch
        assert not {"LDL", "STL"} & kernel.sass.keys(), kernel.launch
        assert kernel.shared_bytes <= SHARED_LIMIT[capability], kernel.launch


def test_products_run_on_tensor_cores(kernels: tuple[int, list[Compiled]]) -> None:
    capability, found = kernels
    product = PRODUCTS[capability]
    for kernel in found:
        if kernel.kernel in ("_mask_kernel", "_sum_kernel"):
            continue
        assert kernel.sass.get(product, 0) > 0, kernel.launch


def test_operands_come_from_shared_memory(kernels: tuple[int, list[Compiled]]) -> None:
    capability, found = kernels
    through_descriptors = [kernel for kernel in found if "_tma_" in kernel.kernel]
    assert bool(through_descriptors) == (capability >= 90)
    for kernel in through_descriptors:
        loops = [body for body in kernel.loops() if "dot" in body or "tc_gen5_mma" in body]
        assert loops, kernel.launch
        for body in loops:
            assert "local_load" not in body, kernel.launch
            assert "ttng.async_tma_copy_global_to_local" in body, kernel.launch
        # each loop prefetches, and so loads each of its tiles once more a stage
        tiles_a_step = 4 if "grad_weight" in kernel.kernel else 2
        loads = kernel.sass["UTMALDG"] - ("data gradient" in kernel.launch)
        assert loads >= len(loops) * tiles_a_step * (kernel.stages - 1), kernel.launch


def test_images_are_read_16_bytes_at_a_time(kernels: tuple[int, list[Compiled]]) -> None:
    _, found = kernels
    for kernel in found:
        if kernel.kernel in ("_mask_kernel", "_sum_kernel"):
            assert kernel.sass["LDG.128"] == kernel.sass["LDG"], kernel.launch
            assert kernel.sass.get("STG.128", 0) >= kernel.sass["STG"] - 1, kernel.launch
        elif kernel.kernel == "_up_conv_fwd_kernel":
            assert kernel.sass["STG.128"] == kernel.sass["STG"], kernel.launch
        elif "_pointer_" in kernel.kernel and "+1->" not in kernel.launch:
            assert kernel.sass.get("LDGSTS.128", 0) > 0, kernel.launch
