"""conv_softmax's Triton kernel: on the GPU, or on the CPU in Triton's interpreter."""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastunet.ops import eager

from .test_conv_softmax import (
    check_labels,
    check_odd,
    check_probabilities,
    exact_inputs,
    inputs,
    widened,
)

KERNELS = "fastunet.ops.conv_softmax.triton_kernels"
# the interpreter's bfloat16 is wrong
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()
# B, C, K, height and width: one block and several, in one step of channels and in more
SHAPES = [
    (1, 64, 2, 17, 23),
    (2, 33, 21, 9, 13),
    (1, 1, 1, 3, 3),
    (3, 8, 17, 1, 1),
    (1, 24, 128, 10, 9),
    (2, 136, 3, 8, 16),
]


@pytest.fixture
def gpu(kernel_device: torch.device) -> ModuleType:
    """The module that launches the kernel."""
    from fastunet.ops.conv_softmax import gpu

    return gpu


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    with_bias: bool,
    gpu: ModuleType,
    kernel_device: torch.device,
) -> None:
    noisy, exact = inputs(shape, dtype, kernel_device), exact_inputs(shape, dtype, kernel_device)
    for arguments in (noisy, exact):
        arguments["bias"] = arguments["bias"] if with_bias else None
        assert gpu.unsupported(**arguments) is None
    # the second launch is as planned by the first
    for _ in range(2):
        check_probabilities(gpu.conv_softmax_triton, noisy)
        check_labels(gpu.conv_argmax_triton, exact)


def test_logits_are_not_rounded(gpu: ModuleType, kernel_device: torch.device) -> None:
    """In float16 eager's are, which costs most of the digits."""
    arguments = inputs((1, 64, 3, 20, 20), torch.float16, kernel_device)
    exact = eager.conv_softmax(**widened(arguments))
    errors = [
        (operator(**arguments) - exact).abs().max()
        for operator in (gpu.conv_softmax_triton, eager.conv_softmax)
    ]
    assert 100 * errors[0] < errors[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_odd_logits(dtype: torch.dtype, gpu: ModuleType, kernel_device: torch.device) -> None:
    check_odd(gpu.conv_softmax_triton, gpu.conv_argmax_triton, dtype, kernel_device)
    check_odd_pixels(gpu, dtype, kernel_device)


def check_odd_pixels(gpu: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """NaN and infinity in an image reach the results of their pixels, and no others."""
    arguments = exact_inputs((1, 8, 3, 5, 9), dtype, device)
    arguments["x"][0, 2, 3, 4], arguments["x"][0, 5, 1, 7] = float("nan"), float("inf")
    arguments["weight"][:, 5, 0, 0] = torch.tensor([-1, 1, 2])
    p, want = gpu.conv_softmax_triton(**arguments), eager.conv_softmax(**arguments)
    torch.testing.assert_close(p, want, equal_nan=True)
    assert int(p.isnan().all(1).sum()) == 2
    assert torch.equal(gpu.conv_argmax_triton(**arguments), eager.conv_argmax(**arguments))


def check_everything(gpu: ModuleType, device: torch.device) -> None:
    """Two images, more than one block and step of channels, equal logits, and odd numbers."""
    shape = (2, 70, 5, 7, 23)
    check_probabilities(gpu.conv_softmax_triton, inputs(shape, torch.float32, device))
    large = inputs(shape, torch.float32, device)
    check_probabilities(gpu.conv_softmax_triton, {**large, "bias": large["bias"] + 200})
    check_labels(gpu.conv_argmax_triton, exact_inputs(shape, torch.float32, device))
    check_odd(gpu.conv_softmax_triton, gpu.conv_argmax_triton, torch.float32, device)
    check_odd_pixels(gpu, torch.float32, device)


def test_reference_serves_the_rest(gpu: ModuleType) -> None:
    good = inputs((1, 16, 4, 5, 6))
    x, weight, bias = good.values()
    for bad, why in (
        ({name: tensor.double() for name, tensor in good.items()}, "is not float16"),
        (inputs((1, 16, 129, 5, 6)), "128 classes, got 129"),
        (inputs((0, 16, 4, 5, 6)), "no pixels"),
        ({"x": x.contiguous()}, "not in channels_last"),
        ({"x": x[:, :, :, :3]}, "not in channels_last"),
        ({"weight": torch.cat([weight, weight], 1)[:, :16]}, "not contiguous"),
        ({"bias": torch.stack([bias, bias], 1)[:, 0]}, "not contiguous"),
    ):
        arguments: Any = {**good, **bad}
        assert why in (gpu.unsupported(**arguments) or "")
        p, labels = gpu.conv_softmax_triton(**arguments), gpu.conv_argmax_triton(**arguments)
        assert torch.equal(p, eager.conv_softmax(**arguments))
        assert torch.equal(labels, eager.conv_argmax(**arguments))


# none reads or writes beyond its tensors: these run in this process
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("inside = p < pixels", "inside = p < pixels - 1"),
        ("x_ptr += b * pixels * C", "x_ptr += 0"),
        ("y_ptr + b * pixels + p, label", "y_ptr + p, label"),
        ("first + tl.arange(0, BLOCK_C)", "tl.arange(0, BLOCK_C)"),
        ("acc = tl.where(is_class[None, :], acc, float(\"-inf\"))", ""),
        ("label = tl.where(nan < BLOCK_K, nan, label)", ""),
        ("tl.where(nan < BLOCK_K, nan, label)", "tl.where(nan < BLOCK_K, 0, label)"),
        ("label = tl.min(tl.where(acc == greatest[:, None], k[None, :], BLOCK_K)",
         "label = tl.max(tl.where(acc == greatest[:, None], k[None, :], 0)"),
        ("tl.sum(share, axis=1)", "tl.max(share, axis=1)"),
        ("acc - greatest[:, None]", "acc"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_mutants_are_found(
    right: str,
    wrong: str,
    gpu: ModuleType,
    kernel_device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of these wrong kernels turns a check of this file red."""
    source = Path(import_module(KERNELS).__file__ or "").read_text()
    assert right in source, "the kernel has changed: change the mutant too"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong))
    name = KERNELS.replace("kernels", "mutant")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, mutant)
    spec.loader.exec_module(mutant)
    check_everything(gpu, kernel_device)
    monkeypatch.setattr(gpu, "classify", mutant.classify)
    with pytest.raises(AssertionError):
        check_everything(gpu, kernel_device)
