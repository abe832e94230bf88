"""Builds the native operators; everything else is in pyproject.toml.

FASTUNET_BUILD_EXT says whether: 0 no; 1 yes, or fail; auto (the default) where torch and a C++
compiler are at hand, and a build that fails leaves a package that works without. torch is at hand
with ``pip install --no-build-isolation``.

FASTUNET_BUILD_CUDA says whether the GPU's operators are part of it: 0 no; 1 yes, or fail; auto (the
default) where torch is a CUDA build and a CUDA toolkit is at hand. No GPU is needed, and the
extension still loads under torch without CUDA. TORCH_CUDA_ARCH_LIST says for which GPUs.
"""

import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = [
    str(path)
    for path in sorted([*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
    if path.name != "ops_cuda.cpp"
]
FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # the oldest torch that the binary loads under, 2.11
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    # every backend gives the same bits
    "-ffp-contract=off",
    # nothing reads errno or floating-point traps, and without them loops vectorise
    "-fno-math-errno",
    "-fno-trapping-math",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# T4, A100, H100 and H200, B200; their relatives run the same code, and later ones compile the PTX
ARCHITECTURES = "7.5;8.0;9.0;10.0+PTX"


def switch(name: str) -> str:
    mode = os.environ.get(name, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {mode!r}")
    return mode


def cuda_home() -> Path | None:
    """The CUDA toolkit, if there is one with a compiler and headers."""
    nvcc = shutil.which("nvcc")
    places = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).resolve().parents[1],
        "/usr/local/cuda",
    ]
    for home in (Path(place) for place in places if place):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0+PTX"."""
    flags = []
    for name in re.split(r"[;\s]+", architectures.strip("; \t\n")):
        known = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if known is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be like {ARCHITECTURES!r}, got {name!r}")
        number = known[1] + known[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if known[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def native() -> dict[str, Any]:
    """The arguments of ``setup`` that build the extension, or none."""
    mode, cuda_mode = switch("FASTUNET_BUILD_EXT"), switch("FASTUNET_BUILD_CUDA")
    if mode == "0":
        if cuda_mode == "1":
            raise SystemExit("FASTUNET_BUILD_CUDA=1 needs FASTUNET_BUILD_EXT other than 0")
        return {}
    if cuda_mode == "1":
        # half of what was asked for is a failure too
        mode = "1"
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if mode == "1":
            message = f"FASTUNET_BUILD_EXT=1 needs torch, which does not import: {error}"
            raise SystemExit(message) from error
        warnings.warn("torch does not import: building without native operators", stacklevel=2)
        return {}

    home = cuda_home()
    if cuda_mode == "1" and home is None:
        raise SystemExit("FASTUNET_BUILD_CUDA=1 needs a CUDA toolkit: CUDA_HOME and PATH have none")
    if cuda_mode == "0" or (cuda_mode == "auto" and torch.version.cuda is None):
        home = None

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                if home is not None:
                    self.add_cuda(home)
                super().build_extensions()
            except Exception as error:
                if mode == "1":
                    raise
                message = f"building without native operators, which did not compile: {error}"
                warnings.warn(message, stacklevel=2)

        def add_cuda(self, home: Path) -> None:
            """Compile the kernels, and make them and their registrations part of the extension."""
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
            flags = [*NVCC_FLAGS, *gencode(architectures)]
            objects = []
            for source in sorted(Path("csrc/cuda").glob("*.cu")):
                output = Path(self.build_temp, source.name).with_suffix(".cu.o")
                output.parent.mkdir(parents=True, exist_ok=True)
                command = [home / "bin" / "nvcc", *flags, "-c", source, "-o", output]
                try:
                    self.spawn([str(part) for part in command])
                except Exception as error:
                    if cuda_mode == "1":
                        raise
                    message = f"building without CUDA operators, which did not compile: {error}"
                    warnings.warn(message, stacklevel=2)
                    return
                objects.append(str(output))
            extension.sources.append("csrc/ops_cuda.cpp")
            extension.extra_objects += objects
            extension.include_dirs.append(str(home / "include"))
            extension.library_dirs += [str(home / "lib64"), str(home / "lib")]
            extension.extra_link_args += [
                "-lcudart_static",
                "-ldl",
                "-lrt",
                "-lpthread",
                # brings libtorch_cuda, which the linker does not see needed, where torch has it
                "-Wl,--push-state,--no-as-needed",
                "-ltorch",
                "-Wl,--pop-state",
            ]

    extension = CppExtension(
        "fastunet._C",
        SOURCES,
        depends=[str(path) for path in sorted(Path("csrc").rglob("*")) if path.is_file()],
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
        # a static C++ runtime or CUDA runtime must not be taken for that of torch
        extra_link_args=["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [],
        # an editable install looks for the file otherwise
        optional=mode == "auto",
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
