"""The GPU's kernels without a GPU: compiled by g++ and run on the host (tests/cuda_emulation)."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastunet.backends import EXTENSION_MISSING

from .test_weight_map import KINDS, random_map

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
# an operator, its arguments as the command line has them, and for the CPU operator
Case = tuple[str, tuple[object, ...], tuple[object, ...]]

ROOT = Path(__file__).parents[2]
SOURCES = ["csrc/cuda/weight_map.cu", "csrc/cuda/separate_touching.cu"]
EMULATION = ROOT / "tests" / "cuda_emulation"
MAP, SEPARATE = torch.ops.fastunet.weight_map, torch.ops.fastunet.separate_touching

INVALID_CONFIGURATION = 9

pytestmark = [
    pytest.mark.skipif(bool(EXTENSION_MISSING), reason=EXTENSION_MISSING or "never"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
]
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 33, 40),
    (1, 5, 9, 14),
    (3, 2, 1, 7),
    (1, 1, 70, 3),
    # cells far apart, where the search stops for want of a visible second
    (1, 1, 60, 120),
    (1, 1, 1, 300),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The kernels as a program for this machine, compiled with further flags."""

    def build(name: str, *flags: str) -> Path:
        program = tmp_path_factory.mktemp("emulation") / name
        command = [
            "g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
            *flags, f"-I{EMULATION}", "-x", "c++", *SOURCES, str(EMULATION / "main.cpp"),
            "-o", str(program),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
        return program

    return build


@pytest.fixture(scope="module")
def program(build: Callable[..., Path]) -> Path:
    return build("emulated")


def command_of(program: Path, order: str, labels: Array, case: Case) -> list[str]:
    operator, arguments, _ = case
    parts = (program, order, 8 * labels.itemsize, *labels.shape, operator, *arguments)
    return [str(part) for part in parts]


def run(program: Path, order: str, labels: Array, case: Case) -> bytes:
    command = command_of(program, order, labels, case)
    done = subprocess.run(command, input=labels.tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def expected(labels: Array, case: Case) -> bytes:
    operator, _, arguments = case
    outputs = (SEPARATE if operator == "separate_touching" else MAP)(
        torch.from_numpy(labels), *arguments
    )
    tensors = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def map_case(
    classes: str | tuple[float, float],
    w0: float = 10.0,
    sigma: float = 5.0,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    distances: bool = False,
) -> Case:
    """weight_map: ``classes`` is "none", "balanced" or the weights of background and cells."""
    kind, pair = (classes, (0.0, 0.0)) if isinstance(classes, str) else ("given", classes)
    given = torch.tensor(pair) if kind == "given" else None
    rest = (w0, sigma, *spacing)
    return (
        "weight_map",
        (kind, *pair, *rest, int(distances)),
        (given, kind == "balanced", *rest, distances),
    )


def separate_case(width: int) -> Case:
    return "separate_touching", (width,), (width,)


CASES = [
    map_case("balanced"),
    map_case("balanced", distances=True),
    map_case("none", 3.0, 1.5, (2.3, 0.7, 1.3)),
    map_case("none", 3.0, 1.5, (2.3, 0.7, 1.3), distances=True),
    map_case((-1.0, 3.0), 5.0, 0.4),
    map_case((1e-6, 50.0), 3e38, 11.0, (0.7, 1.3, 0.2)),
    map_case((0.0, 0.0), 0.0, 1e-9, (1e9, 1e9, 1e9)),
    separate_case(0),
    separate_case(1),
    separate_case(2),
    separate_case(5),
    separate_case(1 << 24),
]


def labels_of(shape: Shape, number: int) -> Array:
    """Every other is of 64-bit ids whose lower halves are all the same; some are negative."""
    rng = np.random.default_rng(number)
    images = [random_map(KINDS[number % 5], shape[1:], 1 + number, rng) for _ in range(shape[0])]
    labels = np.stack(images)
    if number % 2:
        labels = labels.astype(np.int64) << 32
    return np.where((labels == 0) & (rng.random(shape) < 0.1), np.array(-7, labels.dtype), labels)


def check(program: Path, shapes: Sequence[Shape], cases: Sequence[Case] = CASES) -> None:
    for number, shape in enumerate(shapes):
        labels = labels_of(shape, number)
        for case in cases:
            wanted = expected(labels, case)
            for order in ("forward", "reverse"):
                assert run(program, order, labels, case) == wanted, (shape, order, case[:2])


def test_same_bits_as_the_cpu(program: Path) -> None:
    check(program, SHAPES)
    for i in (0, 29, 2**32 - 1, 2**32, 2**40 + 12345):
        for stride, size in ((1, 7), (3, 2**24), (2**33, 5)):
            command = [str(part) for part in (program, "position", i, stride, size)]
            assert int(subprocess.check_output(command)) == i // stride % size
    # a line of more numbers than 48 KB of shared memory hold, along either axis
    check(program, [(1, 1, 1, 13_000), (1, 1, 13_000, 1)], [CASES[0], separate_case(5000)])


def test_sanitizers_find_nothing(build: Callable[..., Path]) -> None:
    """Nor do they where a grid holds three blocks, so that each has several tasks."""
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    check(build("sanitized", "-DFASTUNET_LARGEST_GRID=3", *flags), SHAPES)


def test_check_can_fail(build: Callable[..., Path]) -> None:
    """Without its barriers a block reads what other threads have not written yet."""
    program = build("mutant", "-DEMULATION_WITHOUT_BARRIER")
    labels = labels_of((2, 1, 33, 40), 1)
    for order in ("forward", "reverse"):
        assert run(program, order, labels, CASES[0]) != expected(labels, CASES[0])


def test_every_launch_is_checked(program: Path) -> None:
    """Its error is returned, and nobody else finds it."""
    for shape, case, launches in (
        ((1, 1, 5, 6), CASES[0], 3),
        ((1, 4, 5, 6), CASES[0], 4),
        ((1, 4, 5, 6), separate_case(1), 3),
    ):
        labels = labels_of(shape, 0)
        for failing in range(launches + 1):
            done = subprocess.run(
                command_of(program, "forward", labels, case),
                input=labels.tobytes(),
                env={**os.environ, "FAILING_LAUNCH": str(failing)},
                capture_output=True,
                check=False,
            )
            assert done.returncode == (INVALID_CONFIGURATION if failing < launches else 0)


def test_offsets_are_64_bit() -> None:
    """No compiler narrows an index, so batches of more than 2^31 pixels are addressed rightly.

    Numbers that are narrowed on purpose are converted by name.
    """
    flags = ["-std=c++17", "-fsyntax-only", "-Wconversion", "-Wno-float-conversion", "-Werror"]
    sources = [*SOURCES, "csrc/cpu/weight_map.cpp", "csrc/cpu/separate_touching.cpp"]
    command = ["g++", *flags, f"-isystem{EMULATION}", "-x", "c++", *sources]
    subprocess.run(command, cwd=ROOT, check=True)
