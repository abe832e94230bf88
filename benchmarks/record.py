"""Rows: what was measured, where and how, as JSON and Markdown, and against an older file."""

import json
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastunet
from fastunet.files import replacing

from .cases import DIRECTIONS

COLUMNS = (
    "case",
    "contender",
    "backend",
    "ms",
    "95 % interval",
    "p20 to p80",
    "speed-up",
    "rate",
    "of ceiling",
)

_PLACE = ("device", "driver", "torch", "triton", "threads", "tf32")
# what rows are made of; results and notes beside it do not make it another commit
_SOURCES = ("fastunet", "csrc", "setup.py", "benchmarks", ":!benchmarks/results")


@dataclass(frozen=True)
class Environment:
    """Where and with what a row was measured.

    Args:
        commit: of the checkout, "-dirty" if sources changed; the version where there is none.
        device: the processor's or GPU's own name.
        driver: of the GPU, None on the CPU.
        torch, triton: versions; None if not installed.
        threads: of PyTorch on the CPU.
        tf32: which float32 operations may round their inputs to it: "convolutions", "products",
            "on" for both, "off" for none.
    """

    commit: str
    device: str
    driver: str | None
    torch: str
    triton: str | None
    threads: int
    tf32: str

    def is_place_of(self, other: "Environment") -> bool:
        """Whether only the commit differs, if anything."""
        return all(getattr(self, name) == getattr(other, name) for name in _PLACE)


@dataclass(frozen=True)
class Row:
    """One contender's time for one case.

    Args:
        operator, case, dtype, layout: what was computed.
        contender, backend: by what.
        status: "timed"; "skipped" (not here), "refused" (wrong, or by another path) or "failed".
        reason: of any status but "timed".
        baseline: the contender that speed-ups are over.
        ms, p20_ms, p80_ms: median and percentiles over ``rounds`` of one call.
        low_ms, high_ms: the median's 95 % interval.
        speedup, speedup_low, speedup_high: baseline's time over this, with its 95 % interval.
        gb_s, tflop_s: the case's bytes and operations over the median; None if not counted.
        bound: what limits the case at those ceilings, "bytes" or "operations".
        share: of that ceiling; 1 is as fast as the device can.
        copy_gb_s, matmul_tflop_s: those ceilings, in the same process.
        error: largest absolute error of any result.
        environment: where and with what.
    """

    operator: str
    case: str
    dtype: str
    layout: str
    contender: str
    environment: Environment
    baseline: str
    status: str
    reason: str = ""
    backend: str = ""
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    bound: str = ""
    share: float | None = None
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    error: float | None = None

    @property
    def case_key(self) -> tuple[str, str, str]:
        """``Case.key`` of its case."""
        return self.operator, self.case, self.dtype

    @property
    def direction(self) -> str:
        """Which of ``DIRECTIONS`` the case is, or ""."""
        last = self.case.rpartition(", ")[2]
        return last if last in DIRECTIONS else ""

    def flat(self) -> dict[str, Any]:
        """The row as one level of names and values, rounded to what was measured."""
        values = asdict(self)
        values |= values.pop("environment")
        return {
            name: float(f"{value:.5g}") if isinstance(value, float) else value
            for name, value in values.items()
        }

    def cells(self) -> tuple[str, ...]:
        """The row as text under ``COLUMNS``; only for one that was timed."""
        speed = f"{digits(self.speedup)}x"
        if self.contender != self.baseline:
            speed += f" ({digits(self.speedup_low)} to {digits(self.speedup_high)})"
        return (
            f"{self.case}, {self.dtype}",
            self.contender,
            self.backend,
            digits(self.ms),
            f"{digits(self.low_ms)} to {digits(self.high_ms)}",
            f"{digits(self.p20_ms)} to {digits(self.p80_ms)}",
            speed,
            self._rate(),
            f"{self.share:.0%}",
        )

    def _rate(self) -> str:
        if self.bound == "bytes":
            return byte_rate(self.gb_s or 0.0)
        return flop_rate(self.tflop_s or 0.0)


def notes(rows: Iterable[Row]) -> list[str]:
    """Why rows were not timed, a line for each contender and reason."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "timed":
            note = f"{row.operator}: {row.contender} {row.status}: {row.reason}"
            cases.setdefault(note, []).append(row.case)
    return [
        f"{note} ({names[0]})" if len(names) == 1 else f"{note} ({len(names)} cases)"
        for note, names in cases.items()
    ]


def environment(device: torch.device) -> Environment:
    """Where and with what this process measures on ``device``."""
    name = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    driver, tf32 = None, "off"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = drivers.partition("\n")[0] or None
        tf32 = {
            (True, True): "on",
            (True, False): "convolutions",
            (False, True): "products",
            (False, False): "off",
        }[torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
    return Environment(
        commit=_commit(),
        device=name,
        driver=driver,
        torch=torch.__version__,
        triton=_version("triton"),
        threads=torch.get_num_threads(),
        tf32=tf32,
    )


def slug(where: Environment) -> str:
    """The device as the name of a file: "nvidia-h100-80gb-hbm3"."""
    name = where.device.replace("(R)", "").replace("(TM)", "").lower()
    threads = "" if where.driver else f" {where.threads} threads"
    return re.sub(r"[^a-z0-9]+", "-", name + threads).strip("-")


def write(rows: list[Row], path: Path) -> None:
    """Write the rows to ``path`` as JSON, and beside it as a Markdown table."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([row.flat() for row in rows], indent=1) + "\n")
    with replacing(path.with_suffix(".md")) as temporary:
        # of the numbers as they are kept
        temporary.write_text(markdown(read(path)))


def read(path: Path) -> list[Row]:
    """The rows of a file that ``write`` or ``pytest --benchmark --benchmark-json`` wrote.

    Raises: ValueError, naming the file, if it is none.
    """
    try:
        flat = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        flat = None
    try:
        if isinstance(flat, dict):
            flat = [benchmark["extra_info"] for benchmark in flat["benchmarks"]]
        return [_row(values) for values in flat]
    except (TypeError, KeyError):
        raise ValueError(f"{path}: must hold rows that fastunet bench wrote") from None


def _row(flat: dict[str, Any]) -> Row:
    """The row that ``Row.flat`` made ``flat`` of; columns that are new or gone are no error."""
    where, values = (
        {field.name: flat[field.name] for field in fields(kind) if field.name in flat}
        for kind in (Environment, Row)
    )
    return Row(environment=Environment(**where), **values)


def commits(rows: Iterable[Row]) -> str:
    """Each commit that rows are of, in their order."""
    return ", ".join(dict.fromkeys(row.environment.commit for row in rows))


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def markdown(rows: list[Row]) -> str:
    """A table an operator under a list of where and with what."""
    where = asdict(rows[0].environment) | {"commit": commits(rows)}
    lines = [f"- {name}: {value}" for name, value in where.items()]
    for operator in dict.fromkeys(row.operator for row in rows):
        lines += ["", f"## {operator}", "", line(COLUMNS), line("---" for _ in COLUMNS)]
        found = [row for row in rows if row.operator == operator]
        lines += [line(row.cells()) for row in found if row.status == "timed"]
        lines += ["", *notes(found)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Change:
    """A row now and in an older file.

    Args:
        factor: how many times faster it is now.
        clear: the ranges from 20th to 80th percentile do not overlap.
        same: the intervals of the medians do.
    """

    row: Row
    old: Row
    factor: float
    clear: bool
    same: bool


def changes(rows: list[Row], old: list[Row]) -> list[Change]:
    """The rows that were timed both now and in an older file."""
    before = {(row.case_key, row.contender): row for row in old if row.ms is not None}
    found = []
    for row in rows:
        then = before.get((row.case_key, row.contender))
        if row.ms is None or then is None or then.ms is None:
            continue
        apart = _apart((row.p20_ms, row.p80_ms), (then.p20_ms, then.p80_ms))
        same = not _apart((row.low_ms, row.high_ms), (then.low_ms, then.high_ms))
        found.append(Change(row, then, then.ms / row.ms, apart, same))
    return found


def _apart(one: tuple[float | None, ...], other: tuple[float | None, ...]) -> bool:
    """Whether two ranges have nothing in common; False where a limit is not known."""
    (a, b), (c, d) = one, other
    return None not in (a, b, c, d) and (b < c or d < a)  # type: ignore[operator]


def moved(rows: list[Row], old: list[Row]) -> list[str]:
    """What differs between the places of two files: their times then say little of the code."""
    if not (rows and old):
        return []
    now, then = (asdict(found[0].environment) for found in (rows, old))
    return [
        f"{name}: {then[name]} before, {now[name]} now"
        for name in _PLACE
        if then[name] != now[name]
    ]


def digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1e-3 else f"{value:.6f}"


def byte_rate(gb_s: float) -> str:
    """A rate in the unit that suits it."""
    return f"{digits(gb_s)} GB/s" if gb_s >= 1 else f"{digits(gb_s * 1e3)} MB/s"


def flop_rate(tflop_s: float) -> str:
    """A rate in the unit that suits it."""
    return f"{digits(tflop_s)} TFLOP/s" if tflop_s >= 1 else f"{digits(tflop_s * 1e3)} GFLOP/s"


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    git = ("git", "-C", str(root))
    # an installed copy may lie inside somebody else's checkout
    if (root / ".git").exists() and (commit := _output(*git, "rev-parse", "--short", "HEAD")):
        changed = _output(*git, "status", "--porcelain", "--", *_SOURCES)
        return f"{commit}-dirty" if changed else commit
    return f"fastunet {fastunet.__version__}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        described = ""
    model = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What ``command`` prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
