"""The benchmarks: what they count, what they refuse, how they time, what they record."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record, run
from benchmarks.cases import OURS, Case, Contender, Inputs, Setting, bind, each
from benchmarks.checks import Judge, RefusedError, watch
from benchmarks.figure import arrows
from benchmarks.measure import time_cases
from benchmarks.ops import bench_weight_map
from benchmarks.timing import Clock, Effort, interleave, measure_ceilings, speedup, summary
from fastunet import UNet, ops

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "widths"), [(572, (64, 128, 256, 512, 1024)), (60, (3, 5, 7))])
def test_arrows_are_the_network(size: int, widths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = UNet(widths=widths, ops=ops.eager)
        image = torch.empty(1, 1, size, size)
    with FlopCounterMode(display=False) as counter:
        logits = network(image)
    *_, head = found = list(arrows(size, widths))
    assert head.size == logits.shape[2]
    assert sum(arrow.flops for arrow in found) == counter.get_total_flops()
    copies = [arrow for arrow in found if arrow.kind == "copy"]
    assert all(arrow.skip_size >= arrow.size for arrow in copies)
    assert len(copies) == len(widths) - 1


def test_conv_relu_bytes() -> None:
    # 1 x 1 -> 64 at 188: the image, 9 taps and a bias a channel, 64 images of 186
    case = run.BENCHES["conv_relu"].cases(Setting(CPU, (torch.float32,), sizes=(188,)))[0]
    assert case.moved_bytes == 4 * (188**2 + 64 * 9 + 64 + 64 * 186**2)
    assert case.flops == 2 * 9 * 64 * 186**2


@pytest.mark.parametrize("name", run.BENCHES)
@pytest.mark.parametrize("quick", [True, False])
def test_case_names_are_unique(name: str, quick: bool) -> None:
    setting = Setting(CPU, (torch.float32, torch.bfloat16), quick=quick)
    cases = run.BENCHES[name].cases(setting)
    keys = {(case.name, case.dtype) for case in cases}
    assert len(keys) == len(cases) > 0
    assert {case.operator for case in cases} == {name}
    assert all(case.moved_bytes or case.flops for case in cases)


@pytest.mark.parametrize("name", run.BENCHES)
def test_contenders_agree(name: str, device: torch.device) -> None:
    size = 64 if name == "weight_map" else 188
    for case in run.BENCHES[name].cases(
        Setting(device, (torch.float32,), sizes=(size,), quick=True)
    ):
        if case.flops < 3e9:
            judge = Judge(case, Clock(device))
            for contender in case.contenders:
                if not contender.skip:
                    judge.admit(contender)


def _case(ours: Callable[..., Any], leaves: Sequence[str] = ("x",)) -> Case:
    """Doubling of 8 numbers, in plain PyTorch and by ``ours``."""

    def contender(name: str, function: Callable[..., Any], *, trusted: bool = False) -> Contender:
        return Contender(name, each(lambda given: bind(function, given, leaves)), trusted=trusted)

    def twice(x: Tensor) -> Tensor:
        return x + x

    def inputs() -> Inputs:
        return {"x": torch.linspace(-1, 1, 8)}

    def exact(given: Inputs) -> tuple[Tensor, ...]:
        return bind(twice, {"x": given["x"].double()}, leaves)()

    contenders = (contender("eager", twice, trusted=True), contender(OURS, ours))
    return Case("double", "8", torch.float32, inputs, exact, contenders, moved_bytes=64)


def _rows(case: Case) -> list[record.Row]:
    setting = run.choose("cpu", quick=True)
    ((_, timings),) = time_cases([case], setting, record.environment(CPU))
    return [timing.row for timing in timings]


@pytest.fixture
def probe() -> Any:
    """An operator ``fastunet::probe`` that doubles, with only its reference registered."""
    with torch.library._scoped_library("fastunet", "FRAGMENT") as library:
        library.define("probe(Tensor x) -> Tensor")
        library.impl("probe", probe_reference, "CompositeExplicitAutograd")
        yield library


def probe_reference(x: Tensor) -> Tensor:
    return x + x


def _probe(x: Tensor) -> Tensor:
    return torch.ops.fastunet.probe(x)


def test_watch_names_who_served(probe: torch.library.Library) -> None:
    x = torch.ones(3)
    assert watch(lambda: (_probe(x),))[1] == {"probe": "reference"}
    probe.impl("probe", lambda x: x * 2, "CPU")
    outputs, served = watch(lambda: (_probe(x),))
    assert served == {"probe": "cpp"}
    assert torch.equal(outputs[0], torch.full((3,), 2.0))


def test_watch_sees_backward() -> None:
    inputs = {"x": torch.randn(1, 2, 8, 8), "weight": torch.randn(3, 2, 3, 3)}
    served = watch(bind(ops.conv_relu, inputs, ("x", "weight"), "channels_last"))[1]
    assert {name: served[name] for name in ("conv_relu", "conv_relu_bwd")} == {
        "conv_relu": "onednn",
        "conv_relu_bwd": "onednn",
    }


def test_silent_fallback_is_refused(probe: torch.library.Library) -> None:
    case = _case(_probe, leaves=())
    assert Judge(case, Clock(CPU)).admit(case.contenders[1]).backend == "reference"
    probe.impl("probe", lambda x: probe_reference(x), "CPU")
    with pytest.raises(RefusedError, match="probe: a cpu kernel is there, but the reference ran"):
        Judge(case, Clock(CPU)).admit(case.contenders[1])


def test_bypassed_operator_is_refused() -> None:
    case = _case(lambda x: x + x)
    with pytest.raises(RefusedError, match="none of fastunet's operators ran"):
        Judge(case, Clock(CPU)).admit(case.contenders[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: _probe(x) + 1e-5, "result 0 is off by 1e-05"),
        (lambda x: _probe(x) * float("nan"), "result 0 is off by nan"),
        (lambda x: _probe(x)[:-1], r"shapes \[\[7\]\], should have \[\[8\]\]"),
    ],
)
def test_wrong_kernel_is_refused(
    probe: torch.library.Library, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    case = _case(wrong, leaves=())
    with pytest.raises(RefusedError, match=message):
        Judge(case, Clock(CPU)).admit(case.contenders[1])


def test_refused_row_has_no_time(
    probe: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = _case(lambda x: _probe(x) + 1e-3, leaves=())
    console, text = _console()
    assert _run_only(monkeypatch, wrong, console) == 1
    assert "fastunet refused: result 0 is off by 0.001" in text.getvalue()
    rows = _rows(wrong)
    assert [(row.status, row.ms is None) for row in rows] == [("timed", False), ("refused", True)]


def test_rivals_need_only_half_of_the_digits(probe: torch.library.Library) -> None:
    case = _case(_probe, leaves=())
    judge = Judge(case, Clock(CPU))

    def off_by(error: float) -> Contender:
        return Contender("rival", each(lambda given: lambda: (2 * given["x"] + error,)))

    judge.admit(off_by(1e-5))
    with pytest.raises(RefusedError, match=r"result 0 is off by 0\.01, allowed 0\.00069"):
        judge.admit(off_by(1e-2))


def test_failing_contender_is_named(probe: torch.library.Library) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of luck\nand of memory")

    case = _case(broken, leaves=())
    *_, row = _rows(case)
    assert (row.status, row.reason) == ("failed", "RuntimeError: out of luck")


def test_missing_rival_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_weight_map, "find_spec", lambda name: None)
    case, *_ = bench_weight_map.cases(Setting(CPU, (torch.float32,), sizes=(32,), quick=True))
    assert record.notes(_rows(case)) == [
        "weight_map: edt, two smallest skipped: edt is not installed (1 x 20 cells, 32x32)",
        "weight_map: cuCIM, two smallest skipped: compared on GPUs only (1 x 20 cells, 32x32)",
    ]


class DriftingClock(Clock):
    """A machine that gets slower with every sample; ``speed`` is that of one contender."""

    seconds = 1.0

    def __init__(self, speed: float, log: list[float]) -> None:
        super().__init__(CPU)
        self.speed, self.log = speed, log

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        self.log.append(self.speed)
        return (1 + len(self.log) / 20) / self.speed


def test_interleaving_spreads_drift() -> None:
    log: list[float] = []
    clocks = [DriftingClock(speed, log) for speed in (1.0, 2.0, 4.0)]
    samples = interleave([lambda: None] * 3, clocks, Effort(1e-6, fewest=40, most=99))
    assert samples.shape == (3, 40)
    rounds = np.array(log[-120:]).reshape(40, 3)
    assert (np.sort(rounds) == (1.0, 2.0, 4.0)).all()
    assert len({tuple(order) for order in rounds}) > 1
    # one after the other, the last would have come out at less than half of its speed
    ratio, low, high = speedup(samples[0], samples[2])
    assert low <= 4 <= high
    assert ratio == pytest.approx(4, rel=0.05)


def test_speedup_of_noise_holds_one() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.2, (2, 50))
    ratio, low, high = speedup(noise[0], noise[1])
    assert low < 1 < high
    assert low < ratio < high
    assert speedup(noise[0], noise[0]) == (1, 1, 1)


def test_summary() -> None:
    assert summary(np.linspace(0, 100, 101)) == (50, 20, 80)


def test_clock(device: torch.device) -> None:
    clock = Clock(device)
    # the small one takes one thread, which a busy machine does not hold up every time
    small, large = (torch.ones(n, device=device) for n in (1 << 10, 1 << 24))
    few, many = (
        min(clock.sample(partial(x.add_, 1), 1) for _ in range(20)) for x in (small, large)
    )
    assert 0 < few < many / 4
    repeats, _ = clock.warm_up(lambda: small.add_(1))
    assert repeats == 1 if device.type == "cuda" else repeats > 1
    ceilings = measure_ceilings(device, torch.float32)
    copied = torch.empty_like(large)
    copy_ms = min(clock.sample(lambda: copied.copy_(large), 1) for _ in range(5))
    assert 0.2 < 2 * large.nbytes / copy_ms / 1e6 / ceilings.copy_gb_s < 5


def _console() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=200), text


def _run_only(monkeypatch: pytest.MonkeyPatch, case: Case, console: Console, **options: Any) -> int:
    class Bench:
        @staticmethod
        def cases(setting: Setting) -> list[Case]:
            return [case]

    monkeypatch.setitem(run.BENCHES, case.operator, Bench)
    return run.run([case.operator], device="cpu", quick=True, console=console, **options)


def test_run_records_and_compares(tmp_path: Path) -> None:
    console, text = _console()
    path, charts = tmp_path / "out" / "rows.json", tmp_path / "charts"
    options: dict[str, Any] = {"device": "cpu", "sizes": [32], "quick": True, "console": console}
    assert run.run(["weight_map"], json_path=path, plot=charts, fail_under=1e-6, **options) == 0

    rows = json.loads(path.read_text())
    assert [row["contender"] for row in rows if row["status"] == "timed"].count(OURS) == 2
    assert rows[0]["speedup"] == 1
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["threads"] == torch.get_num_threads()
    timed = [row for row in rows if row["status"] == "timed"]
    assert all(row["p20_ms"] <= row["ms"] <= row["p80_ms"] for row in timed)
    assert "| 1 x 20 cells, 32x32, float32 | fastunet |" in path.with_suffix(".md").read_text()
    assert {file.name for file in charts.iterdir()} == {
        "speedup-weight_map-float32.png",
        "speedup-weight_map-float32.svg",
    }
    assert (charts / "speedup-weight_map-float32.png").read_bytes().startswith(b"\x89PNG")

    rows[-1]["threads"] = 99
    rows[0]["threads"] = 99
    path.write_text(json.dumps(rows))
    assert run.run(["weight_map"], compare=path, fail_under=1e6, **options) == 1
    assert "threads: 99 before" in text.getvalue()
    assert "slower than 1e+06x" in text.getvalue()


def _row(**values: Any) -> record.Row:
    defaults: dict[str, Any] = {
        "operator": "weight_map",
        "case": "a",
        "dtype": "float32",
        "layout": "contiguous",
        "contender": OURS,
        "environment": record.environment(CPU),
        "baseline": "scipy",
        "status": "timed",
        "ms": 2.0,
        "p20_ms": 1.9,
        "p80_ms": 2.1,
        "low_ms": 1.95,
        "high_ms": 2.05,
    }
    return record.Row(**{**defaults, **values})


@pytest.mark.parametrize(
    ("old", "clear", "same"), [(6.0, True, False), (2.15, False, False), (2.05, False, True)]
)
def test_changes(old: float, clear: bool, same: bool) -> None:
    row = _row()
    before = replace(
        row, ms=old, p20_ms=old - 0.1, p80_ms=old + 0.1, low_ms=old - 0.05, high_ms=old + 0.05
    )
    (change,) = record.changes([row], [before, replace(before, case="b")])
    assert (change.factor, change.clear, change.same) == (old / 2, clear, same)
    assert not record.changes([row], [replace(row, ms=None)])


def test_moved() -> None:
    row = _row()
    assert record.moved([row], [row]) == []
    there = replace(row.environment, threads=99)
    (difference,) = record.moved([row], [replace(row, environment=there)])
    assert difference.startswith("threads: 99 before")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": ["conv"]}, "no benchmark is called 'conv'; there are conv_relu"),
        ({"dtypes": ["float64"]}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"sizes": [0]}, "size must be positive, got 0"),
        ({"batches": [-1]}, "batch must be positive, got -1"),
        ({"record_in": Path(), "plot": Path()}, "it goes without json and plot"),
        ({"device": "meta"}, "benchmarks run on cpu or cuda, got 'meta'"),
        ({"compare": Path("absent.json")}, "absent.json: cannot be read"),
    ],
)
def test_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.run(**options)


@pytest.mark.parametrize("text", ["", "{}", '{"a": 1}', "[1]", '[{"operator": "x"}]'])
def test_rejects_foreign_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"old\.json: must hold rows that fastunet bench wrote"):
        record.read(path)


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.plots.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="plots need matplotlib: pip install"):
        run.run(["weight_map"], plot=tmp_path)


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
    )


def test_pytest_runs_benchmarks_on_request_alone() -> None:
    asked = _pytest("--benchmark", "-k", "weight_map and 20")
    assert asked.returncode == 0, asked.stdout
    # scipy twice and ours; the edt package takes part where it is installed
    assert re.search(r"\b[34] passed", asked.stdout)
    plain = _pytest("--collect-only", "benchmarks")
    assert "no tests collected" in plain.stdout
    mixed = _pytest("--benchmark", "tests")
    assert "--benchmark takes no paths" in mixed.stderr
