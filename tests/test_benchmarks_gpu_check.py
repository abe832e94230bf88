"""``make gpu-check``: stages that are resumed, cut off and left out, rehearsed without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import CUT_OFF, FAILED, ROOT, Check, Stage, digest, main, stages


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def note(path: Path, word: str, status: int = 0) -> tuple[str, ...]:
    """Appends ``word`` to a file and ends with ``status``."""
    return python(f"import sys; open({str(path)!r}, 'a').write('{word} '); sys.exit({status})")


def test_finished_stages_are_not_run_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    build, broken = Stage("build", note(log, "build")), Stage("tests", note(log, "tests", 1))
    tune = Stage("tune", note(log, "tune"), needs="build")
    assert Check(tmp_path / "state", 1, "a").run([build, broken, tune]) == FAILED
    mended = Stage("tests", note(log, "tests"))
    assert Check(tmp_path / "state", 1, "a").run([build, mended, tune]) == 0
    assert log.read_text().split() == ["build", "tests", "tune", "tests"]
    # other sources have to prove everything
    assert Check(tmp_path / "state", 1, "b").run([build]) == 0
    assert log.read_text().split()[-1] == "build"


@pytest.mark.parametrize("on_interrupt", ["SIG_DFL", "SIG_IGN"])
def test_cut_off_stage_is_run_again(
    on_interrupt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it ends when it is interrupted or has to be killed."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    log = tmp_path / "log"
    code = f"import signal, time; signal.signal(signal.SIGINT, signal.{on_interrupt})"
    slow = Stage("slow", python(f"{code}; time.sleep(60)"))
    last = Stage("last", note(log, "last"))
    start = time.monotonic()
    assert Check(tmp_path / "state", 0.02, "a").run([slow, last]) == CUT_OFF
    assert time.monotonic() - start < 30
    assert Check(tmp_path / "state", 0.0, "a").run([last]) == CUT_OFF
    assert not log.exists()
    quick = Stage("slow", note(log, "quick"))
    assert Check(tmp_path / "state", 1, "a").run([quick, last]) == 0
    assert log.read_text().split() == ["quick", "last"]


def test_benchmark_with_rows_left_goes_on_later(tmp_path: Path) -> None:
    log = tmp_path / "log"
    bench = Stage("bench", note(log, "{minutes}", 3), partial=(3,))
    for _ in range(2):
        assert Check(tmp_path / "state", 1, "a").run([bench]) == 0
    assert len(log.read_text().split()) == 2
    assert all(0.9 < float(word) <= 1 for word in log.read_text().split())


def test_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    found = [
        Stage("build", note(log, "build", 1)),
        Stage("tests", note(log, "tests"), needs="build"),
        Stage("sanitizer", note(log, "sanitizer"), skip="compute-sanitizer is not installed"),
    ]
    assert Check(tmp_path / "state", 1, "a").run(found) == FAILED
    assert log.read_text().split() == ["build"]
    told = capsys.readouterr().out
    assert "tests: left out: build failed" in told
    assert "sanitizer: left out: compute-sanitizer is not installed" in told


def test_stages(tmp_path: Path) -> None:
    on_gpu = {stage.name: stage for stage in stages("cuda", tmp_path, tmp_path, (), ())}
    assert list(on_gpu) == ["build", "tests", "sanitizer", "tune", "bench", "bench-compiled"]
    assert on_gpu["build"].environment == {"FASTUNET_BUILD_CUDA": "1"}
    assert "--no-index" in on_gpu["build"].command
    rehearsed = {stage.name: stage for stage in stages("cpu", tmp_path, tmp_path, (), ())}
    assert {name for name, stage in rehearsed.items() if stage.skip} == {
        "sanitizer",
        "tune",
        "bench-compiled",
    }
    assert "make gpu-check" in (ROOT / "README.md").read_text()


def test_digest() -> None:
    assert digest() == digest()
    assert len(digest()) == 64


def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests and a benchmark on the CPU, twice: the second time nothing is left to do."""
    arguments = [
        "--device=cpu", "--minutes=4", f"--folder={tmp_path / 'state'}",
        f"--results={tmp_path / 'results'}", "--only", "tests", "bench",
        "--tests", "tests/test_benchmarks_results.py::test_sections",
        "--bench", "separate_touching --size 32",
    ]  # fmt: skip
    assert main(arguments) == 0
    (rows,) = (tmp_path / "results").glob("*.json")
    first = rows.read_text()
    assert {row["operator"] for row in json.loads(first)} == {"separate_touching"}
    assert rows.with_suffix(".md").exists()
    assert list(rows.with_suffix("").glob("*.svg"))
    passed = (tmp_path / "state" / "passed").read_text().splitlines()
    assert passed == ["tests/test_benchmarks_results.py::test_sections"]
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == ["tests: passed before", "bench: passed before"]
    assert rows.read_text() == first


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "this torch finds no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--device=cpu", "--only", "paint"])
    assert "no stage is called paint" in capsys.readouterr().err


def test_passed_tests_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(
        "import os\n"
        "def test_good(): open('ran', 'a').write('good ')\n"
        "def test_bad():\n"
        "    open('ran', 'a').write('bad ')\n"
        "    assert os.environ.get('MENDED')\n"
    )

    def run(**environment: str) -> int:
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.passed", "--passed=passed"]
        return subprocess.run(
            [*command, "-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "", **environment},
            check=False,
            capture_output=True,
        ).returncode

    assert run() == 1
    assert run(MENDED="1") == 0
    # none is left
    assert run() == 5
    assert (tmp_path / "ran").read_text().split() == ["good", "bad", "bad"]
