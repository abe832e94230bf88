"""One extension for CPU and CUDA torch: built, inspected and loaded, all without a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastunet.backends import EXTENSION_MISSING

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
NM = shutil.which("nm")
# what a module needs of the stable ABI of Python
PYTHON_SYMBOLS = {"PyModule_Create2"}
WEAK_SYMBOLS = {"aoti_torch_get_current_cuda_stream"}
# the CPU's operators are as in the extension without CUDA, and here take no time to optimise
QUICK_CXX = """#!/bin/sh
case "$*" in *ops_cuda.cpp*) ;; *) set -- "$@" -O0 ;; esac
exec c++ "$@"
"""

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
needs_nm = pytest.mark.skipif(NM is None, reason="no nm on this machine")


def setup(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The extension with CUDA operators, and what the compilers said of them."""
    folder = tmp_path_factory.mktemp("build")
    compiler = folder / "c++"
    compiler.write_text(QUICK_CXX)
    compiler.chmod(0o755)
    done = setup(
        "build_ext", "--build-temp", folder / "temp", "--build-lib", folder / "lib",
        FASTUNET_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="", NVCC_APPEND_FLAGS="-Xptxas -v",
        MAX_JOBS="1", CXX=str(compiler),
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    (extension,) = folder.glob("lib/fastunet/_C*")
    return extension, output


def check_abi(extension: Path) -> None:
    """As every torch from 2.11 and every Python from 3.10 can load it."""
    assert extension.name == "_C.abi3.so"
    listing = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(extension)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    undefined = re.findall(r"^\s+([Uwv]) ([^@\n]+)", listing, re.MULTILINE)
    kinds = {name: kind for kind, name in undefined}
    stable = {name for name in kinds if re.match(r"(aoti_)?torch_\w+$", name)}
    assert stable
    for name, kind in kinds.items():
        assert not re.search(r"\b(at|c10|torch|caffe2)::", name)
        assert not name.startswith("cuda")
        if name.startswith(("Py", "_Py")):
            assert name in PYTHON_SYMBOLS
        if name in stable:
            assert (kind == "w") == (name in WEAK_SYMBOLS)


@needs_nm
@pytest.mark.skipif(bool(EXTENSION_MISSING), reason=EXTENSION_MISSING or "never")
def test_abi_is_stable() -> None:
    check_abi(Path(sys.modules["fastunet._C"].__file__ or ""))


@needs_nm
@needs_nvcc
def test_abi_with_cuda_is_stable(cuda_build: tuple[Path, str]) -> None:
    check_abi(cuda_build[0])
    dynamic = subprocess.check_output(["readelf", "-d", cuda_build[0]], text=True)
    # the one library that brings CUDA's half of torch where there is one
    assert "[libtorch.so]" in dynamic
    assert "cuda" not in dynamic


@needs_nvcc
def test_kernels_do_not_spill(cuda_build: tuple[Path, str]) -> None:
    output = cuda_build[1]
    kernels = r"_(scan_lines|settle|merge_lines|weigh_rows|join_windows)_kernel"
    compiled = re.findall(rf"Compiling entry function '\w*{kernels}\w*' for '(sm_\d+)'", output)
    # all but one for both types of ids
    for architecture in ("sm_75", "sm_80", "sm_90", "sm_100"):
        assert len([one for one in compiled if one[1] == architecture]) == 9
    assert "code=compute_100" in output
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", output)
    assert len(stacks) >= len(compiled)
    assert set(stacks) == {("0", "0", "0")}
    # so that as many threads as a block has find registers
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", output)) <= 64


@needs_nvcc
def test_extension_with_cuda_loads_anywhere(cuda_build: tuple[Path, str]) -> None:
    """Under torch without CUDA too; the report then knows what is registered."""
    code = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('fastunet._C', {str(cuda_build[0])!r})\n"
        "sys.modules['fastunet._C'] = module = importlib.util.module_from_spec(spec)\n"
        "import fastunet\n"
        "spec.loader.exec_module(module)\n"
        "rows = fastunet.backends.report()\n"
        "print(*[f'{row.operator} {row.backend}' for row in rows if row.device == 'cuda'],\n"
        "      *[f'{row.operator} {row.backend}' for row in rows if row.device == 'cpu'],\n"
        "      fastunet.weight_map(torch.zeros(3, 4, dtype=torch.int32)).sum().item(), sep=',')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for device in ("cuda", "cpp"):
        assert f"weight_map {device}" in done.stdout
        assert f"separate_touching {device}" in done.stdout
    assert done.stdout.strip().endswith(",12.0")


@pytest.mark.parametrize(
    ("message", "environment"),
    [
        ("FASTUNET_BUILD_CUDA must be auto, 0 or 1, got 'on'", {"FASTUNET_BUILD_CUDA": "on"}),
        ("FASTUNET_BUILD_CUDA=1 needs FASTUNET_BUILD_EXT other than 0",
         {"FASTUNET_BUILD_CUDA": "1", "FASTUNET_BUILD_EXT": "0"}),
    ],
)  # fmt: skip
def test_cuda_switch_is_checked(message: str, environment: dict[str, str]) -> None:
    done = setup("--name", **environment)
    assert done.returncode != 0
    assert message in done.stderr


@needs_nvcc
@pytest.mark.parametrize("switch", ["auto", "1"])
def test_build_with_a_broken_nvcc(switch: str, tmp_path: Path) -> None:
    """It fails where CUDA was asked for, and only there."""
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = '13.0'\n")
    done = setup(
        "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib",
        FASTUNET_BUILD_CUDA=switch, NVCC_APPEND_FLAGS="--no-such-flag", CXX="false", CC="false",
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert (done.returncode == 0) == (switch == "auto")
    if switch == "auto":
        assert "building without CUDA operators, which did not compile" in done.stderr


@needs_nvcc
def test_architectures_are_checked(tmp_path: Path) -> None:
    done = setup(
        "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib",
        FASTUNET_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;Hopper",
    )  # fmt: skip
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST must be like '7.5;8.0;9.0;10.0+PTX', got 'Hopper'" in done.stderr


def test_needs_a_toolkit(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from pathlib import Path\n"
        "exists = Path.exists\n"
        "Path.exists = lambda path: path.name != 'nvcc' and exists(path)\n"
    )
    done = setup("--name", FASTUNET_BUILD_CUDA="1", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "FASTUNET_BUILD_CUDA=1 needs a CUDA toolkit" in done.stderr
    done = setup("--name", FASTUNET_BUILD_CUDA="auto", PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "fastunet"
