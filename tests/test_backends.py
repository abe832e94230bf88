"""The extension is optional, and the report says what the dispatcher does."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastunet import backends

ROOT = Path(__file__).parents[1]


def run(code: str, **environment: str) -> str:
    """The output of Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_report_has_a_row_an_operator_and_device() -> None:
    rows = backends.report()
    assert [(row.operator, row.device) for row in rows] == [
        (operator, device) for operator in backends.OPERATORS for device in ("cpu", "cuda")
    ]
    for row in rows:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fastunet::{row.operator}", row.device.upper()
        )
        assert (row.backend != "reference") == registered
        assert (row.why == "") == registered


def test_report_follows_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "OPERATORS", ("probe",))

    def row() -> backends.Row:
        return next(row for row in backends.report() if row.device == "cuda")

    with torch.library._scoped_library("fastunet", "FRAGMENT") as library:
        library.define("probe(Tensor x) -> Tensor")
        library.impl("probe", lambda x: x, "CompositeExplicitAutograd")
        before = row()
        assert before.backend == "reference"
        assert before.why
        library.impl("probe", lambda x: x, "CUDA")
        assert row() == backends.Row("probe", "cuda", "triton", "")


@pytest.mark.skipif(bool(backends.EXTENSION_MISSING), reason="the native extension is not built")
def test_head_is_native_on_the_cpu() -> None:
    served = {row.operator: row.backend for row in backends.report() if row.device == "cpu"}
    assert served["conv_softmax"].startswith("cpp")
    assert served["conv_argmax"].startswith("cpp")
    assert served["conv_relu"].startswith("onednn")


def test_missing_extension_is_normal() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.load_extension("fastunet._not_there") == (
            "the native extension is not built"
        )
    output = run(
        "import sys; sys.modules['fastunet._C'] = None\n"
        "import fastunet, numpy, torch\n"
        "fastunet.conv_argmax(torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1))\n"
        "labels = numpy.eye(4, dtype=int)\n"
        "fastunet.separate_touching(labels), fastunet.weight_map(labels)\n"
        "rows = fastunet.backends.report()\n"
        "rows = [row for row in rows if row.device == 'cpu']\n"
        "print(*sorted({(row.backend.split(',')[0], row.why) for row in rows}))",
        PYTHONWARNINGS="error::RuntimeWarning",
    )
    # conv_relu runs on PyTorch's own oneDNN
    assert output == "('onednn', '') ('reference', 'the native extension is not built')"


def test_broken_extension_is_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extension.abi3.so").write_bytes(b"not a library")
    (tmp_path / "needs_another.py").write_text("import not_there_either")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_extension", "needs_another"):
        with pytest.warns(RuntimeWarning, match=f"{name}: the native extension does not load"):
            assert backends.load_extension(name).startswith("the native extension does not load")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept() -> None:
    """A block that is freed and taken again faults in no more pages."""
    faults = run(
        "import resource\n"
        "from fastunet import backends\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    b'x' * (64 << 20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "returned = [faults() for _ in range(3)][-1]\n"
        "kept = backends.keep_freed_memory()\n"
        "print(kept, returned, [faults() for _ in range(3)][-1])\n",
    ).split()
    if faults[0] == "False":
        pytest.skip("no glibc")
    assert int(faults[2]) < int(faults[1]) / 10


def setup(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_switch_is_checked(tmp_path: Path) -> None:
    done = setup(tmp_path, "--name", FASTUNET_BUILD_EXT="yes")
    assert done.returncode != 0
    assert "FASTUNET_BUILD_EXT must be auto, 0 or 1, got 'yes'" in done.stderr


@pytest.mark.parametrize("mode", ["auto", "0", "1"])
def test_build_without_torch(mode: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    done = setup(tmp_path, "--name", FASTUNET_BUILD_EXT=mode, PYTHONPATH=str(tmp_path))
    if mode == "1":
        assert done.returncode != 0
        assert "FASTUNET_BUILD_EXT=1 needs torch, which does not import: hidden" in done.stderr
    else:
        assert done.stdout.strip() == "fastunet"


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_build_without_a_compiler(mode: str, tmp_path: Path) -> None:
    folders = ("--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    done = setup(tmp_path, "build_ext", *folders, FASTUNET_BUILD_EXT=mode, CXX="false", CC="false")
    assert (done.returncode == 0) == (mode == "auto")
    assert not list(tmp_path.rglob("*.so"))
    if mode == "auto":
        assert "building without native operators" in done.stderr
