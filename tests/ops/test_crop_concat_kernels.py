"""crop_concat's GPU kernels: run on a GPU or in Triton's interpreter, compiled ahead of time."""

import importlib.util
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ..aot import GPUS, compiled
from .test_crop_concat import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    check_backward,
    check_forward,
    far_apart,
    inputs,
    mixtures,
)

KERNELS = "fastunet.ops.crop_concat.triton_kernels"

# the levels of figure 1 with few channels and a seventh of the rows
CUT_LEVELS = [
    (1, 8, 8, 8, 56, 8, 8),
    (1, 8, 8, 14, 104, 4, 32),
    (1, 4, 4, 28, 200, 4, 80),
    (1, 4, 4, 56, 392, 24, 176),
]


@pytest.fixture
def kernels(kernel_device: torch.device) -> ModuleType:
    """The module of the kernels."""
    return importlib.import_module(KERNELS)


def check(module: ModuleType, device: torch.device, shape: tuple[int, ...], layout: str) -> None:
    """Both kernels of ``module`` on one problem."""
    skip, up = map(LAYOUTS[layout], inputs(shape, torch.float32, device))
    check_forward(module.crop_concat_triton, skip, up)
    grad = module.crop_concat_triton(skip, up)
    check_backward(module.crop_concat_bwd_triton, grad, skip)


def check_levels(module: ModuleType, device: torch.device) -> None:
    """Both layouts of the lowest level, and of odd sizes."""
    for shape in (CUT_LEVELS[0], SHAPES[2]):
        for layout in ("contiguous", "channels_last"):
            check(module, device, shape, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [*CUT_LEVELS, *SHAPES[2:]])
def test_kernels(
    shape: tuple[int, ...], layout: str, kernels: ModuleType, kernel_device: torch.device
) -> None:
    check(kernels, kernel_device, shape, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_dtypes(
    dtype: torch.dtype, layout: str, kernels: ModuleType, kernel_device: torch.device
) -> None:
    skip, up = map(LAYOUTS[layout], inputs((2, 4, 8, 6, 8, 3, 4), dtype, kernel_device))
    check_forward(kernels.crop_concat_triton, skip, up)
    grad = LAYOUTS[layout](kernels.crop_concat_triton(skip, up))
    check_backward(kernels.crop_concat_bwd_triton, grad, skip)


def test_kernels_of_strides(kernels: ModuleType, kernel_device: torch.device) -> None:
    # a third of the pairs have all layouts on both sides
    for skip, up, grad in islice(mixtures(kernel_device), 0, None, 3):
        check_forward(kernels.crop_concat_triton, skip, up)
        check_backward(kernels.crop_concat_bwd_triton, grad, skip)


def test_kernels_far_apart(kernels: ModuleType, kernel_device: torch.device) -> None:
    check_forward(kernels.crop_concat_triton, *far_apart(kernel_device))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", GPUS)
def test_compiled(capability: int) -> None:
    """No spills, and every access is as wide as the launch's name says."""
    found = compiled("tests.ops.launches_crop_concat")[capability]
    assert {k.kernel for k in found} == {"_crop_concat_fwd_kernel", "_crop_concat_bwd_kernel"}
    for kernel in found:
        access_bytes = int(kernel.launch.partition(",")[0])
        assert kernel.spilled_bytes == 0
        assert not {"LDL", "STL"} & set(kernel.sass)
        for instruction in ("LDG", "STG"):
            count = kernel.sass[instruction]
            pairs, quads = (kernel.sass.get(instruction + width, 0) for width in (".64", ".128"))
            if access_bytes == 16:
                assert count == quads > 0
            elif access_bytes == 8:
                assert count == pairs + quads > 0
            else:
                assert pairs == quads == 0


@pytest.fixture
def mutant(
    request: pytest.FixtureRequest, kernels: ModuleType, tmp_path: Path
) -> Iterator[ModuleType]:
    """The module with one text replaced by another."""
    right, wrong = request.param
    source = Path(kernels.__file__ or "").read_text()
    assert right in source
    path = tmp_path / "mutant_kernels.py"
    path.write_text(
        source.replace(right, wrong).replace("from .ref", "from fastunet.ops.crop_concat.ref")
    )
    spec = importlib.util.spec_from_file_location("mutant_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutant_kernels"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutant_kernels"]


# none reads or writes beyond its tensors: these run in this process
@pytest.mark.parametrize(
    "mutant",
    [
        ("lane < vectors - first", "lane < vectors - first - 1"),
        ("out_ptr, up_start", "out_ptr, 0"),
        ("place - starts[3]", "place - starts[3] + 1"),
        ("line < lengths[2]", "line < lengths[2] - 1"),
        ("other=0", "other=1"),
        ("inner - starts[1]", "inner"),
        ("count * element_bytes", "0"),
        ("formats.pop()", "torch.contiguous_format"),
    ],
    indirect=True,
)
def test_mutants_are_found(mutant: ModuleType, kernel_device: torch.device) -> None:
    """Each of these wrong kernels turns a check of this file red."""
    with pytest.raises((AssertionError, RuntimeError)):
        check_levels(mutant, kernel_device)
