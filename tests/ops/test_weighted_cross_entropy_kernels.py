"""weighted_cross_entropy's Triton kernels, on a GPU or interpreted, against PyTorch and float64."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastunet
from fastunet.ops.weighted_cross_entropy import reference

from .cross_entropy import LAYOUTS, REDUCTIONS, by, check, inputs, random_inputs

triton_kernels = pytest.importorskip(
    "fastunet.ops.weighted_cross_entropy.triton_kernels", reason="Triton is not installed"
)
# the interpreter's NumPy says so where infinities are subtracted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# the interpreter computes bfloat16 wrongly
HALVES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
SAMPLES = """
import sys, torch
from torch.testing._internal.common_methods_invocations import op_db
(op,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
samples = [
    (sample.input.detach(), sample.args[0], sample.kwargs)
    for sample in op.sample_inputs("cpu", torch.float32, requires_grad=False)
    if not sample.args[0].is_floating_point()
]
torch.save(samples, sys.argv[1])
"""


def by_kernels(module: ModuleType = triton_kernels) -> Callable[..., Tensor]:
    """weighted_cross_entropy by the kernels of ``module``, whatever the device."""
    return by(module.weighted_cross_entropy_triton, module.weighted_cross_entropy_bwd_triton)


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 16, 64])
@pytest.mark.parametrize("size", [(36, 36), (5, 7)])
def test_forward_and_backward(
    size: tuple[int, int], classes: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    """Figure 1's output cut small, and odd sizes."""
    arguments = inputs((2, classes, *size), dtype, kernel_device)
    check(arguments | {"reduction": "weighted_mean", "label_smoothing": 0.1}, by_kernels())
    plain = arguments | {"pixel_weight": None, "class_weight": None}
    check(plain | {"reduction": "none"}, by_kernels())


def test_expanded_gradient(kernel_device: torch.device) -> None:
    """The sum of "none" sends back one number, expanded."""
    arguments = inputs((2, 3, 8, 7), torch.float32, kernel_device)
    logits = arguments.pop("logits").requires_grad_()
    grads = [
        torch.autograd.grad(by_kernels()(logits, **arguments, reduction=reduction).sum(), logits)
        for reduction in ("none", "sum")
    ]
    torch.testing.assert_close(*grads)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random(data: st.DataObject, kernel_device: torch.device) -> None:
    arguments = random_inputs(data, [torch.float32, *HALVES], 9)
    check(on(kernel_device, arguments), by_kernels())


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, classes: int, kernel_device: torch.device) -> None:
    arguments = inputs((2, classes, 6, 9), torch.float32, kernel_device)
    arguments["logits"] = LAYOUTS[layout](arguments["logits"])
    arguments["target"] = LAYOUTS["sliced"](arguments["target"][None])[0]
    arguments["pixel_weight"] = LAYOUTS["transposed"](arguments["pixel_weight"][None])[0]
    check(arguments, by_kernels())
    logits = arguments["logits"].detach().requires_grad_()
    by_kernels()(**{**arguments, "logits": logits}).backward()
    assert logits.grad is not None
    assert logits.grad.stride() == torch.empty_like(logits).stride()


@pytest.mark.parametrize("classes", [3, 16])
def test_extreme_logits(classes: int, kernel_device: torch.device) -> None:
    """+-1e4, -inf and NaN come out as PyTorch has them, in each tile of classes."""
    extremes = torch.tensor([0.0, 1e4, -1e4, -torch.inf, torch.nan])
    logits = extremes[torch.randint(5, (1, classes, 40, 40))]
    logits[:, 0, :20] = 0.0
    logits[:, :, 0] = -torch.inf
    arguments = on(
        kernel_device,
        {"logits": logits, "target": torch.randint(classes, (1, 40, 40)), "reduction": "none"},
    )
    logits = arguments.pop("logits").requires_grad_()
    results = []
    for operator in (by_kernels(), torch.nn.functional.cross_entropy):
        loss = operator(logits, **arguments)
        results += [(loss, torch.autograd.grad(loss, logits, torch.ones_like(loss))[0])]
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True)


def test_nothing_counts(kernel_device: torch.device) -> None:
    arguments = inputs((1, 3, 6, 6), torch.float32, kernel_device, ignored=1.0)
    assert by_kernels()(**arguments).isnan()
    assert by_kernels()(**arguments, reduction="sum") == 0


def test_sum_of_many_blocks(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial sums than are added at once, and the same bits every time."""
    monkeypatch.setattr(triton_kernels, "_TOTAL_BLOCK", 4)
    arguments = inputs((7, 2, 1, 1025), torch.float32, kernel_device)
    check(arguments, by_kernels())
    first, second = (by_kernels()(**arguments) for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PyTorch's own samples; making them changes settings of the process that does."""
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest")
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    subprocess.run([sys.executable, "-c", SAMPLES, str(path)], check=True)
    return torch.load(path)


@pytest.mark.parametrize("operator", [fastunet.weighted_cross_entropy, by_kernels()])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_samples_of_pytorch(
    dtype: torch.dtype, operator: Any, samples: Any, kernel_device: torch.device
) -> None:
    assert len(samples) > 10
    for logits, target, options in samples:
        renamed = {{"weight": "class_weight"}.get(name, name): v for name, v in options.items()}
        # ours has a batch and pixels
        batched = logits.ndim > 1
        arguments = {
            "logits": (logits if batched else logits[None]).to(dtype),
            "target": target if batched else target[None],
            "pixel_weight": None,
            "class_weight": None,
            **renamed,
        }
        check(on(kernel_device, arguments), operator)


def test_unsupported(kernel_device: torch.device) -> None:
    """float64 and empty logits are served by the reference."""
    arguments = inputs((1, 3, 5, 5), torch.float64, kernel_device)
    check(arguments, by_kernels())
    assert triton_kernels.unsupported(arguments["logits"]) == "no kernel computes in torch.float64"
    nothing = inputs((0, 3, 5, 5), torch.float32, kernel_device)
    assert triton_kernels.unsupported(nothing["logits"]) == "there is nothing to compute"
    assert by_kernels()(**nothing, reduction="sum") == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_returns_what_the_reference_does(reduction: str, kernel_device: torch.device) -> None:
    """Shapes, dtypes and strides, the gradient that was asked for included."""
    arguments = inputs((2, 3, 5, 6), torch.float32, kernel_device)
    values = (*arguments.values(), -100, 0.0, reduction, True)
    got = triton_kernels.weighted_cross_entropy_triton(*values)
    want = reference.weighted_cross_entropy_reference(*values)
    for ours, plain in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain, check_stride=True)


@pytest.mark.parametrize(
    ("right", "wrong", "classes"),
    [
        ("whole[None, :] - wanted", "whole[None, :] + wanted", 3),
        ("total * tl.exp(before - now)", "total", 16),
        ("k < CLASSES)[:, None] & inside[None, :]\n", "k < 99)[:, None] & inside[None, :]\n", 3),
        ("counts = inside & (target != ignore_index)", "counts = inside", 3),
        ("at = b * pixels + p", "at = p", 2),
        ("range(0, blocks, BLOCK)", "range(0, blocks - 1, BLOCK)", 2),
        ("of_class *= weight", "of_class *= 1", 2),
    ],
)
def test_check_can_fail(
    right: str, wrong: str, classes: int, tmp_path: Path, kernel_device: torch.device
) -> None:
    """A wrong kernel is seen."""
    source = Path(triton_kernels.__file__).read_text()
    assert right in source
    source = source.replace(right, wrong).replace(
        "from .reference", "from fastunet.ops.weighted_cross_entropy.reference"
    )
    path = tmp_path / "mutant.py"
    # an assertion that fails ends all use of a GPU
    source = source.replace('"debug": True', '"debug": False')
    path.write_text(source.replace("_TOTAL_BLOCK = 1024", "_TOTAL_BLOCK = 1"))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules["mutant"] = mutant
    spec.loader.exec_module(mutant)
    arguments = inputs((2, classes, 25, 25), torch.float32, kernel_device, ignored=0.3)
    with pytest.raises(AssertionError, match="is above"):
        check(arguments | {"reduction": "weighted_mean"}, by_kernels(mutant))
