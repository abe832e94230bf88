"""A run of the benchmarks: its rows, its files, what it resumes, ``pytest --benchmark``."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import measure, plots, record, run, timing
from benchmarks.cases import OURS, Setting
from benchmarks.pytest_suite import Replay

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
BRIEF = timing.Effort(seconds=0.05, fewest=5, most=20, visits=2)


@pytest.fixture
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured is little where the question is what becomes of it."""
    for name in ("QUICK", "FULL"):
        monkeypatch.setattr(measure, name, BRIEF)


@pytest.mark.usefixtures("_briefly")
def test_run_records_and_compares(tmp_path: Path) -> None:
    text = StringIO()
    console = Console(file=text, width=200)
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
    # or it takes itself for one of several processes, and times nothing
    own = {name: value for name, value in os.environ.items() if "PYTEST_XDIST" not in name}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=own)


def test_pytest_runs_benchmarks_on_request_alone() -> None:
    asked = _pytest("--benchmark", "-k", "weight_map and 20")
    assert asked.returncode == 0, asked.stdout
    # scipy twice and ours; the edt package takes part where it is installed
    assert re.search(r"\b[34] passed", asked.stdout)
    plain = _pytest("--collect-only", "benchmarks")
    assert "no tests collected" in plain.stdout
    mixed = _pytest("--benchmark", "tests")
    assert "--benchmark takes no paths" in mixed.stderr


@pytest.mark.usefixtures("_briefly")
def test_same_medians_as_fastunet_bench(tmp_path: Path) -> None:
    """What pytest-benchmark reports are the samples of the row that goes with them."""
    path = tmp_path / "pytest.json"
    done = _pytest("--benchmark", "-k", "separate_touching", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        row = benchmark["extra_info"]
        assert benchmark["stats"]["median"] * 1e3 == pytest.approx(row["ms"], rel=1e-4)
        assert benchmark["stats"]["rounds"] == row["rounds"]
    text = StringIO()
    console = Console(file=text, width=200)
    options: dict[str, Any] = {"device": "cpu", "quick": True, "console": console}
    assert run.run(["separate_touching"], compare=path, **options) == 0
    assert re.search(r"the intervals of \d of 4 medians overlap", text.getvalue())


def test_replay() -> None:
    replay = Replay()
    replay.load(np.array([2.0, 4.0]))
    times = [-replay() + replay() for _ in range(2)]
    assert times == [0.002, 0.004]


@pytest.mark.usefixtures("_briefly")
def test_record_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    time_cases = measure.time_cases

    def counted(cases: Any, *others: Any) -> Any:
        seen.extend(case.name for case in cases)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return time_cases(cases, *others)

    monkeypatch.setattr(run, "time_cases", counted)
    options: dict[str, Any] = {
        "device": "cpu",
        "sizes": [32],
        "batches": [1, 2],
        "record_in": tmp_path,
    }

    def again(**more: Any) -> tuple[int, list[str]]:
        seen.clear()
        status = run.run(["separate_touching"], console=Console(quiet=True), **options, **more)
        return status, list(seen)

    status, names = again()
    assert (status, len(names)) == (run.LEFT_OVER, 3)
    (path,) = tmp_path.glob("*.json")
    assert len(record.read(path)) == 4
    # the one that was interrupted, and the last
    status, names = again()
    assert (status, names) == (0, [names[0], names[1]])
    assert len(record.read(path)) == 8
    assert path.read_text().count("width 3") == 4
    assert again(minutes=0) == (0, [])
    # rows of another commit are replaced, those of another place are not kept
    monkeypatch.setattr(record, "_commit", lambda: "1234567")
    assert again(minutes=0)[0] == run.LEFT_OVER
    assert len(again()[1]) == 3
    commits = [row.environment.commit for row in record.read(path)]
    assert commits.count("1234567") == 4
    rows = [replace(row.environment, threads=99) for row in record.read(path)]
    assert not rows[0].is_place_of(record.environment(CPU))


def test_in_turns() -> None:
    setting = Setting(CPU, (torch.float32,), quick=True)
    cases = run.plan((), setting)
    turns = run.in_turns(cases)
    assert sorted(map(repr, turns)) == sorted(map(repr, cases))
    assert [case.operator for case in turns[: len(run.BENCHES)]] == list(reversed(run.BENCHES))


def test_sizes_and_batches() -> None:
    setting = Setting(CPU, (torch.float32,))
    assert setting.shapes([(4, 8), (1, 9)], [(1, 2)]) == [(4, 8), (1, 9)]
    asked = replace(setting, sizes=(256, 570, 572), batches=(1, 16))
    fitting = asked.network_shapes([(4, 8)], [])
    assert fitting == [(1, 268), (16, 268), (1, 572), (16, 572)]
    names = [case.name for case in run.plan(["unet"], replace(setting, batches=(16,)))]
    assert names[0] == "16 x 64..1024 channels, 572x572, prediction"
    usual = " ".join(case.name for case in run.plan(["unet"], setting))
    for size in ("268x268", "524x524", "572x572", "1036x1036"):
        assert size in usual


def test_charts_are_the_same_for_the_same_rows(tmp_path: Path) -> None:
    rows = [
        _row(contender=name, speedup=ratio, speedup_low=ratio, speedup_high=ratio)
        for name, ratio in (("eager", 1.0), (OURS, 2.0))
    ]
    first, second = (plots.draw(rows, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
