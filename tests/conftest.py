"""Seeds, no TF32, and deterministic mode, which fills fresh memory with NaN."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# without a GPU, kernels run in Triton's interpreter; it is read when Triton is first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# or cuBLAS is not deterministic; it is read when that is first used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# begun in this order, before all others: no process has a long one left when the rest is done
SLOWEST = [
    "test_conv_relu_kernels.py",
    "test_unet.py",
    "test_graphs.py",
    "test_benchmarks_run.py",
    "test_extension.py",
    "test_conv_relu_compiled.py",
    "test_distributed.py",
    "test_weighted_cross_entropy_kernels.py",
    "test_cuda_kernels.py",
    "test_winograd_transforms.py",
    "test_benchmarks_gpu_check.py",
    "test_train.py",
    "test_accelerate.py",
    "test_weighted_cross_entropy.py",
    "test_conv_relu.py",
    "test_crop_concat_kernels.py",
    "test_weighted_cross_entropy_compiled.py",
    "test_benchmarks.py",
    "test_backends.py",
    "test_distributed_apply.py",
    "test_cli.py",
    "test_training_options.py",
    "test_apply_inputs.py",
    # a process that has run OpenVINO can crash when it sends itself a signal, as those before do
    "test_benchmarks_contenders.py",
    "test_conv_softmax_compiled.py",
]

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fastunet.ops import _library, folding

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    # or small calls would be PyTorch's
    for module in (_library, folding):
        monkeypatch.setattr(module, "FEW_ELEMENTS", 0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small wait for their threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="no GPU on this machine"
            ),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has."""
    return torch.device(request.param)


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton's kernels run: the GPU, or the CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call of a convolution of ours that an accelerated model makes."""
    from fastunet.ops import folding

    calls: list[Any] = []

    def listened(operator: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(options)
            return operator(*args, **options)

        return call

    for name in ("conv_relu", "conv3x3"):
        monkeypatch.setattr(folding, name, listened(getattr(folding, name)))
    return calls


@pytest.fixture
def em_folder() -> Path:
    """The EM sections of the ISBI 2012 challenge."""
    return _data("isbi2012")


@pytest.fixture
def nuclei_folder() -> Path:
    """Nuclei of the 2018 Data Science Bowl."""
    return _data("dsb2018")


def _data(name: str) -> Path:
    folder = DATA / name
    if not folder.exists():
        pytest.skip(f"real data {name} is not beside the project")
    return folder
