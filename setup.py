"""Builds the native operators; everything else is in pyproject.toml.

FASTUNET_BUILD_EXT says whether: 0 no; 1 yes, or fail; auto (the default) where torch and a C++
compiler are at hand, and a build that fails leaves a package that works without. torch is at hand
with ``pip install --no-build-isolation``.
"""

import os
import warnings
from pathlib import Path
from typing import Any

from setuptools import setup

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


def native() -> dict[str, Any]:
    """The arguments of ``setup`` that build the extension, or none."""
    mode = os.environ.get("FASTUNET_BUILD_EXT", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FASTUNET_BUILD_EXT must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if mode == "1":
            message = f"FASTUNET_BUILD_EXT=1 needs torch, which does not import: {error}"
            raise SystemExit(message) from error
        warnings.warn("torch does not import: building without native operators", stacklevel=2)
        return {}

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if mode == "1":
                    raise
                message = f"building without native operators, which did not compile: {error}"
                warnings.warn(message, stacklevel=2)

    extension = CppExtension(
        "fastunet._C",
        ["csrc/ops.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))],
        depends=[str(header) for header in sorted(Path("csrc").rglob("*.h"))],
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
        # an editable install looks for the file otherwise
        optional=mode == "auto",
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
