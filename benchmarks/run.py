"""``fastunet bench``: run the chosen bench files, show their rows, record and compare them."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from fastunet.devices import PRECISIONS, autocast_dtype, pick_device

from . import bench_unet, plots, record, show
from .cases import OURS, Case, Setting, dtype_name
from .measure import time_cases
from .ops import (
    bench_conv_norm_relu,
    bench_conv_relu,
    bench_conv_relu_pair,
    bench_conv_softmax,
    bench_crop_concat,
    bench_separate_touching,
    bench_up_conv,
    bench_weight_map,
    bench_weighted_cross_entropy,
)
from .record import Row
from .timing import measure_ceilings

BENCHES: dict[str, ModuleType] = {
    "conv_relu": bench_conv_relu,
    "conv_relu_pair": bench_conv_relu_pair,
    "conv_norm_relu": bench_conv_norm_relu,
    "up_conv": bench_up_conv,
    "crop_concat": bench_crop_concat,
    "conv_softmax": bench_conv_softmax,
    "weighted_cross_entropy": bench_weighted_cross_entropy,
    "weight_map": bench_weight_map,
    "separate_touching": bench_separate_touching,
    "unet": bench_unet,
}

# exit statuses
REFUSED, LEFT_OVER = 1, 3


def run(
    operators: Sequence[str] = (),
    *,
    device: str = "auto",
    dtypes: Sequence[str] = (),
    sizes: Sequence[int] = (),
    batches: Sequence[int] = (),
    quick: bool = False,
    only: str = "",
    without: str | None = None,
    json_path: Path | None = None,
    record_in: Path | None = None,
    minutes: float | None = None,
    plot: Path | None = None,
    compare: Path | None = None,
    fail_under: float | None = None,
    console: Console | None = None,
) -> int:
    """Time fastunet against its rivals and show a table a case.

    Args:
        operators: names in ``BENCHES``; none for all.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtypes: "float32", "bfloat16", "float16"; none for those that pay on the device.
        sizes: heights and widths of the network's input, in pixels, taken up to the next that fits.
        batches: images.
        quick: few small cases, in two minutes on two cores.
        only: a regular expression that the names of the cases match.
        without: a regular expression; contenders whose names match it take no part.
        json_path: file for the rows, written after each case; a Markdown table goes beside it.
        record_in: folder that keeps a file of rows, a table and charts for each device. Rows that
            it holds of this commit are not measured again, others of the device are replaced.
        minutes: begin no case after these, as after an interrupt. The operators then take turns,
            important cases first.
        plot: folder for the charts, PNG and SVG.
        compare: a file that an earlier run, or ``pytest --benchmark``, wrote.
        fail_under: the least speed-up of fastunet over the first contender of each case.
        console: where the tables go.
    Returns: exit status: 0; ``LEFT_OVER`` if time was up before the last case began; ``REFUSED`` if
        a case of fastunet was refused or failed, or if the whole interval of its speed-up lies
        under ``fail_under``.
    Raises: ValueError for arguments that cannot work; ModuleNotFoundError for plots without
        matplotlib. Both before anything is timed.
    """
    console = console or Console()
    setting = choose(device, dtypes, sizes, batches, quick)
    cases = chosen(plan(operators, setting), only, without)
    order = {case.key: i for i, case in enumerate(cases)}
    old = record.read(compare) if compare else []
    if record_in and (json_path or plot):
        raise ValueError("record keeps rows and charts: it goes without json and plot")
    if plot:
        plots.require()

    where = record.environment(setting.device)
    console.print(f"{where.device}, torch {where.torch}, {where.threads} threads, {where.commit}")
    rows: list[Row] = []
    if record_in:
        json_path = record_in / f"{record.slug(where)}.json"
        if json_path.exists():
            rows = [row for row in record.read(json_path) if where.is_place_of(row.environment)]
            console.print(f"{len(rows)} rows are kept from {json_path}")
        if plots.available():
            plot = json_path.with_suffix("")
        else:
            console.print("no charts: matplotlib is not installed")
    finished = {
        (row.case_key, row.contender)
        for row in rows
        if row.environment == where and row.status != "failed"
    }
    cases = [
        case
        for case in cases
        if any((case.key, contender.name) not in finished for contender in case.contenders)
    ]
    if minutes is not None:
        cases = in_turns(cases)
    for each in setting.dtypes if cases else ():
        ceilings = measure_ceilings(setting.device, each)
        console.print(
            f"ceilings: copy {ceilings.copy_gb_s:.3g} GB/s, "
            f"{dtype_name(each)} product {record.flop_rate(ceilings.matmul_tflop_s)}"
        )

    broken = False
    until = time.monotonic() + (60 * minutes if minutes is not None else float("inf"))
    while cases and time.monotonic() < until:
        # quick cases are visited in turns
        group = cases if quick else cases[:1]
        try:
            timed = time_cases(group, setting, where)
            if setting.device.type == "cuda":
                # after an illegal access all that follows would fail
                torch.cuda.synchronize(setting.device)
        except KeyboardInterrupt:
            break
        except torch.AcceleratorError as error:
            console.print(f"the GPU stopped at {', '.join(group[0].key)}: {error}", markup=False)
            broken = True
            break
        # a case may hold a network, and is let go
        cases = cases[len(group) :]
        for case, timings in timed:
            found = [timing.row for timing in timings]
            show.case(found, console)
            rows = [row for row in rows if row.case_key != case.key] + found
        rows.sort(key=lambda row: order.get(row.case_key, len(order)))
        if json_path:
            record.write(rows, json_path)
    if plot:
        plots.draw(rows, plot)

    asked = [row for row in rows if row.case_key in order]
    for note in record.notes(asked):
        console.print(note, markup=False)
    if compare:
        show.changes(asked, old, compare, console)
    if cases:
        console.print(f"{len(cases)} cases are left, first {', '.join(cases[0].key)}")
        return REFUSED if broken else LEFT_OVER
    return _verdict(asked, fail_under, console)


def _verdict(rows: list[Row], fail_under: float | None, console: Console) -> int:
    ours = [row for row in rows if row.contender == OURS]
    under = [row for row in ours if row.speedup_high and row.speedup_high < (fail_under or 0)]
    if under:
        console.print(f"slower than {fail_under:g}x:")
        show.slow(under, console)
    return REFUSED if under or any(row.status != "timed" for row in ours) else 0


def choose(
    device: str = "auto",
    dtypes: Sequence[str] = (),
    sizes: Sequence[int] = (),
    batches: Sequence[int] = (),
    quick: bool = False,
) -> Setting:
    """The setting for options as ``run`` takes them.

    Raises: ValueError for options that cannot work.
    """
    chosen = pick_device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"benchmarks run on cpu or cuda, got {device!r}")
    for name, values in (("size", sizes), ("batch", batches)):
        for value in values:
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
    for dtype in dtypes:
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}")
    return Setting(
        chosen,
        tuple(getattr(torch, name) for name in dtypes or usual_dtypes(chosen, quick)),
        tuple(sizes),
        tuple(batches),
        quick,
    )


def usual_dtypes(device: torch.device, quick: bool) -> list[str]:
    """What people compute in on ``device``, the important ones first."""
    fast = autocast_dtype(device)
    if device.type == "cuda":
        all_of_them = ["float32", "float16"] if fast is None else ["bfloat16", "float32", "float16"]
    else:
        # float16 is for processors that few have, and there only on request
        all_of_them = ["float32"] if fast is None else ["float32", dtype_name(fast)]
    return all_of_them[:1] if quick else all_of_them


def plan(operators: Sequence[str], setting: Setting) -> list[Case]:
    """The cases of the benches called ``operators``, or of all.

    Raises: ValueError for a name that is none of a bench.
    """
    for name in operators:
        if name not in BENCHES:
            raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(BENCHES)}")
    return [case for name in operators or BENCHES for case in BENCHES[name].cases(setting)]


def chosen(cases: Sequence[Case], only: str, without: str | None) -> list[Case]:
    """The cases, and of each the contenders, that ``run`` takes; the first contender stays.

    Raises: ValueError for what is no regular expression, or if no case is left.
    """
    for name, pattern in (("only", only), ("without", without or "")):
        try:
            re.compile(pattern)
        except re.error as error:
            message = f"{name} must be a regular expression, got {pattern!r}: {error}"
            raise ValueError(message) from None
    found = [case for case in cases if re.search(only, case.name)]
    if not found:
        raise ValueError(f"no case is called like {only!r}; the first is {cases[0].name!r}")
    if without is None:
        return found
    return [
        replace(
            case,
            contenders=tuple(
                contender
                for i, contender in enumerate(case.contenders)
                if i == 0 or not re.search(without, contender.name)
            ),
        )
        for case in found
    ]


def in_turns(cases: Sequence[Case]) -> list[Case]:
    """The first case of each bench before the second of any; the network begins."""
    of_bench = [[case for case in cases if case.operator == name] for name in reversed(BENCHES)]
    return [case for turn in zip_longest(*of_bench) for case in turn if case]
