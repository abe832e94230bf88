"""Winograd's transforms by themselves: under sanitizers, and with wrong coefficients."""

import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from ..accuracy import WINOGRAD_ERROR

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cpu"
LINES, TRANSFORMS = SOURCES / "winograd_lines.h", SOURCES / "winograd.cpp"
DRIVER = ROOT / "tests" / "ops" / "winograd_driver.cpp"

# one wrong coefficient each
MUTANTS = [
    ("even_a - kA2 * (d[2]", "even_a - kB2 * (d[2]"),
    ("v[3] = even_b + kB * odd_b", "v[3] = even_b + kA * odd_b"),
    ("u[5] = g[2]", "u[5] = g[1]"),
    ("{kScaleB, -kScaleB * kB,", "{kScaleB, -kScaleB * kA,"),
    ("y[2] = kA2 * sum_a + kB2 * sum_b", "y[2] = kA2 * sum_a + kA2 * sum_b"),
    ("odd_b = kB * y[1] + kB3 * y[3]", "odd_b = kB * y[1] + kA3 * y[3]"),
    ("g[2] = kA2 * sum_a", "g[2] = kB2 * sum_a"),
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[list[float]]]:
    """What the driver prints, compiled with further flags and, on request, with other lines."""
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{SOURCES}"]

    @cache
    def driver(*flags: str) -> Path:
        """What calls the transforms, of which it knows the declarations."""
        path = tmp_path_factory.mktemp("driver") / "driver.o"
        command = [*compiler, *flags, *include, "-c", str(DRIVER), "-o", str(path)]
        subprocess.run(command, check=True)
        return path

    def errors(*flags: str, lines: str | None = None) -> list[list[float]]:
        folder = tmp_path_factory.mktemp("winograd")
        code = TRANSFORMS.read_text()
        if "-O3" not in flags:
            # what is chosen for a processor is chosen before a sanitizer has started
            code = code.replace("FASTUNET_VECTORIZED_WIDE ", "")
        (folder / TRANSFORMS.name).write_text(code)
        (folder / LINES.name).write_text(LINES.read_text() if lines is None else lines)
        command = [
            *compiler, *flags, *include, str(folder / "winograd.cpp"), str(driver(*flags)),
            "-o", str(folder / "driver"),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        output = subprocess.check_output([str(folder / "driver")], text=True)
        return [[float(number) for number in line.split()] for line in output.splitlines()]

    return errors


def test_accurate(errors: Callable[..., list[list[float]]]) -> None:
    for line in errors("-O3"):
        assert len(line) == 5
        assert max(line) <= WINOGRAD_ERROR


def test_sanitizers_find_nothing(errors: Callable[..., list[list[float]]]) -> None:
    flags = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert max(map(max, errors(*flags))) <= WINOGRAD_ERROR


@pytest.mark.parametrize("change", MUTANTS, ids=str)
def test_check_can_fail(change: tuple[str, str], errors: Callable[..., list[list[float]]]) -> None:
    lines = LINES.read_text()
    assert lines.count(change[0]) == 1
    assert max(map(max, errors(lines=lines.replace(*change)))) > 100 * WINOGRAD_ERROR
