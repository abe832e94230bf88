"""``fastunet bench``: run the chosen bench files, show their rows, record and compare them."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastunet.devices import PRECISIONS, pick_device

from . import bench_unet, plots, record
from .cases import OURS, Case, Contender, Setting, dtype_name
from .checks import Judge, RefusedError
from .ops import bench_conv_relu, bench_crop_concat, bench_weight_map, bench_weighted_cross_entropy
from .timing import (
    FULL,
    QUICK,
    Ceilings,
    Clock,
    Samples,
    interleave,
    measure_ceilings,
    speedup,
    summary,
)

BENCHES: dict[str, ModuleType] = {
    "conv_relu": bench_conv_relu,
    "crop_concat": bench_crop_concat,
    "weighted_cross_entropy": bench_weighted_cross_entropy,
    "weight_map": bench_weight_map,
    "unet": bench_unet,
}


def run(
    operators: Sequence[str] = (),
    *,
    device: str = "auto",
    dtype: str | None = None,
    size: int | None = None,
    batch: int | None = None,
    quick: bool = False,
    json_path: Path | None = None,
    plot: Path | None = None,
    compare: Path | None = None,
    fail_under: float | None = None,
    console: Console | None = None,
) -> int:
    """Time fastunet against its rivals and show a table an operator.

    Args:
        operators: names in ``BENCHES``; none for all.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "float32", "bfloat16" or "float16"; None is float32, and on a GPU bfloat16 too.
        size: height and width of the network's input, in pixels, taken up to the next that fits.
        batch: images.
        quick: few small cases, within a minute on two cores.
        json_path: file for the rows; a Markdown table goes beside it.
        plot: folder for the charts, PNG and SVG.
        compare: a file that an earlier run wrote with ``json_path``.
        fail_under: the least speed-up of fastunet over the first contender of each case.
        console: where the tables go.
    Returns: exit status: 0; 1 if a case of fastunet was refused or failed, or if the whole interval
        of its speed-up lies under ``fail_under``.
    Raises: ValueError for arguments that cannot work; ModuleNotFoundError for plots without
        matplotlib. Both before anything is timed.
    """
    console = console or Console()
    setting = choose(device, dtype, size, batch, quick)
    operators = list(operators) or list(BENCHES)
    for name in operators:
        if name not in BENCHES:
            raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(BENCHES)}")
    old = record.read(compare) if compare else []
    if plot:
        plots.require()

    where = record.environment(setting.device)
    console.print(f"{where.device}, torch {where.torch}, {where.threads} threads, {where.commit}")
    for each in setting.dtypes:
        ceilings = measure_ceilings(setting.device, each)
        console.print(
            f"ceilings: copy {ceilings.copy_gb_s:.3g} GB/s, "
            f"{dtype_name(each)} product {record.flop_rate(ceilings.matmul_tflop_s)}"
        )
    rows: list[record.Row] = []
    for name in operators:
        found: list[record.Row] = []
        with console.status(name) as status:
            for case in BENCHES[name].cases(setting):
                status.update(f"{name}: {case.name}")
                found += time_case(case, setting, where)
        _show(found, console)
        rows += found

    if json_path:
        record.write(rows, json_path)
    if plot:
        plots.draw(rows, plot)
    if compare:
        _show_changes(rows, old, compare, console)
    return _verdict(rows, fail_under, console)


def choose(
    device: str = "auto",
    dtype: str | None = None,
    size: int | None = None,
    batch: int | None = None,
    quick: bool = False,
) -> Setting:
    """The setting for options as ``run`` takes them.

    Raises: ValueError for options that cannot work.
    """
    chosen = pick_device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"benchmarks run on cpu or cuda, got {device!r}")
    for name, value in (("size", size), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if dtype is None:
        wanted = ["float32"] if chosen.type == "cpu" or quick else ["float32", "bfloat16"]
    elif dtype in PRECISIONS:
        wanted = [dtype]
    else:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}")
    return Setting(chosen, tuple(getattr(torch, name) for name in wanted), size, batch, quick)


def time_case(case: Case, setting: Setting, where: record.Environment) -> list[record.Row]:
    """Check the contenders of ``case``, time those that pass together, and give each a row."""

    def row(contender: Contender, status: str, reason: str = "", **measured: Any) -> record.Row:
        return record.Row(
            operator=case.operator,
            case=case.name,
            dtype=dtype_name(case.dtype),
            layout=contender.layout,
            contender=contender.name,
            environment=where,
            baseline=case.contenders[0].name,
            status=status,
            reason=reason,
            **measured,
        )

    first, *others = case.contenders
    try:
        judge = Judge(case)
        trials = [judge.admit(first)]
    except Exception as error:
        return [row(contender, "failed", _brief(error)) for contender in case.contenders]
    rows = {}
    for contender in others:
        if contender.skip:
            rows[contender.name] = row(contender, "skipped", contender.skip)
            continue
        try:
            trials.append(judge.admit(contender))
        except RefusedError as error:
            rows[contender.name] = row(contender, "refused", str(error))
        except Exception as error:
            rows[contender.name] = row(contender, "failed", _brief(error))
    samples = interleave(
        [trial.call for trial in trials],
        [Clock(setting.device_of(trial.contender)) for trial in trials],
        QUICK if setting.quick else FULL,
    )
    ceilings = measure_ceilings(setting.device, case.dtype)
    for trial, times in zip(trials, samples, strict=True):
        measured = _measured(case, times, samples[0], ceilings)
        rows[trial.contender.name] = row(
            trial.contender, "timed", backend=trial.backend, error=max(trial.errors), **measured
        )
    return [rows[contender.name] for contender in case.contenders]


def _measured(
    case: Case, samples: Samples, baseline: Samples, ceilings: Ceilings
) -> dict[str, Any]:
    """The numbers of a row."""
    ms, p20_ms, p80_ms = summary(samples)
    ratio, low, high = speedup(baseline, samples)
    copy_ms = case.moved_bytes / ceilings.copy_gb_s / 1e6
    matmul_ms = case.flops / ceilings.matmul_tflop_s / 1e9
    return {
        "ms": ms,
        "p20_ms": p20_ms,
        "p80_ms": p80_ms,
        "rounds": len(samples),
        "speedup": ratio,
        "speedup_low": low,
        "speedup_high": high,
        "gb_s": case.moved_bytes / ms / 1e6 if case.moved_bytes else None,
        "tflop_s": case.flops / ms / 1e9 if case.flops else None,
        "bound": "bytes" if copy_ms > matmul_ms else "operations",
        "share": max(copy_ms, matmul_ms) / ms,
        "copy_gb_s": ceilings.copy_gb_s,
        "matmul_tflop_s": ceilings.matmul_tflop_s,
    }


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _show(rows: list[record.Row], console: Console) -> None:
    """A table for each case, narrow enough for 80 columns."""
    timed = [row for row in rows if row.status == "timed"]
    for case, of_case in groupby(timed, key=lambda row: row.cells()[0]):
        table = Table(
            title=f"{rows[0].operator}: {case}", title_justify="left", box=SIMPLE_HEAD, padding=0
        )
        for column in ("contender", "ms", "p20 to p80", "speed-up", "rate", "ceiling"):
            table.add_column(f"{column} ", justify="right", no_wrap=True)
        for row in of_case:
            _, contender, backend, *cells = (cell.replace(" to ", "-") for cell in row.cells())
            if row.contender == OURS:
                # of several operators each is named; here is room for who they are
                served = sorted({part.rpartition(" ")[2] for part in backend.split(", ")})
                contender = f"{contender} ({', '.join(served)})"
            table.add_row(*(f"{cell} " for cell in (contender, *cells)))
        console.print(table)
    for note in record.notes(rows):
        console.print(note, markup=False)


def _show_changes(
    rows: list[record.Row], old: list[dict[str, Any]], path: Path, console: Console
) -> None:
    for difference in record.moved(rows, old):
        console.print(f"not where {path} was measured: {difference}")
    changes = record.changes(rows, old)
    if not changes:
        console.print(f"{path} has no row of fastunet in common with this run")
        return
    table = Table("operator", "case", "ms before", "ms now", "times faster", title=f"since {path}")
    for change in changes:
        table.add_row(
            change.row.operator,
            change.row.case,
            record.digits(change.old_ms),
            record.digits(change.row.ms),
            f"{change.factor:.2f}x" + ("" if change.clear else ", p20 to p80 overlap"),
        )
    console.print(table)


def _verdict(rows: list[record.Row], fail_under: float | None, console: Console) -> int:
    ours = [row for row in rows if row.contender == OURS]
    bad = [row for row in ours if row.status != "timed"]
    slow = [row for row in ours if row.speedup_high and row.speedup_high < (fail_under or 0)]
    for row in slow:
        console.print(f"{row.operator}: {row.speedup:.2f}x, under {fail_under:g}x ({row.case})")
    return 1 if bad or slow else 0
