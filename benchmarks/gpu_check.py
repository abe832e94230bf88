"""``make gpu-check``: what a GPU has to prove, in stages that a time limit may cut off.

    python -m benchmarks.gpu_check --minutes 8

builds the extension in place with the torch that is there, runs every test on the GPU, the native
kernels under compute-sanitizer where that is installed, tunes and benchmarks, and leaves rows, a
table and charts in benchmarks/results. No network is needed. Stages and tests that passed, kernels
that were tuned and rows that were measured are not done again by the next call, unless sources
changed.
``--device cpu`` rehearses it without a GPU.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fastunet", "csrc", "tests", "benchmarks", "setup.py", "conftest.py", "pyproject.toml")
# tests that launch the kernels written in CUDA
NATIVE_TESTS = ("tests/ops/test_weight_map.py", "tests/ops/test_separate_touching.py")

# exit statuses: of this, of pytest where nothing was left to run, of `fastunet bench --minutes`
FAILED, CUT_OFF = 1, 3
NO_TESTS, ROWS_LEFT = 5, 3
# how long a stage may take to end once it is asked to
GRACE_SECONDS = 20.0
# a benchmark of less says nothing
LEAST_BENCH_MINUTES = 0.5


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        command: its words; "{minutes}" becomes what is left of the time.
        environment: variables besides those that are set.
        good: exit statuses that finish it.
        partial: exit statuses that are no failure and leave more to do for another call.
        skip: why it is left out, or "".
        needs: the stage without which it makes no sense, or "".
        least_minutes: it does not begin with less.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    good: tuple[int, ...] = (0,)
    partial: tuple[int, ...] = ()
    skip: str = ""
    needs: str = ""
    least_minutes: float = 0.0


class Check:
    """Runs stages until a deadline and remembers in ``folder`` which are finished."""

    def __init__(self, folder: Path, minutes: float, digest: str) -> None:
        self._folder = folder
        self._until = time.monotonic() + 60 * minutes
        self._file = folder / "finished.json"
        state = json.loads(self._file.read_text()) if self._file.exists() else {}
        if state.get("sources") != digest:
            # also what the stages themselves remember
            shutil.rmtree(folder, ignore_errors=True)
            state = {"sources": digest, "finished": []}
        folder.mkdir(parents=True, exist_ok=True)
        self._state = state

    def run(self, stages: Sequence[Stage]) -> int:
        """Run ``stages`` in turn; a failed one does not keep others from running.

        Returns: 0, ``FAILED`` if a stage failed, ``CUT_OFF`` if time was up before the last began.
        """
        failed: set[str] = set()
        for stage in stages:
            if stage.skip or stage.needs in failed:
                _say(f"{stage.name}: left out: {stage.skip or f'{stage.needs} failed'}")
                failed |= {stage.name} if stage.needs in failed else set()
            elif stage.name in self._state["finished"]:
                _say(f"{stage.name}: passed before")
            elif self._minutes_left() <= stage.least_minutes:
                _say(f"{stage.name}: no time is left; call again to go on")
                return FAILED if failed else CUT_OFF
            else:
                status = self._call(stage)
                if status is None:
                    _say(f"{stage.name}: cut off; call again to go on")
                    return FAILED if failed else CUT_OFF
                if status in stage.good:
                    self._finish(stage)
                elif status not in stage.partial:
                    failed.add(stage.name)
        return FAILED if failed else 0

    def _minutes_left(self) -> float:
        return (self._until - time.monotonic()) / 60

    def _finish(self, stage: Stage) -> None:
        self._state["finished"].append(stage.name)
        temporary = self._file.with_suffix(".partial")
        temporary.write_text(json.dumps(self._state))
        temporary.replace(self._file)

    def _call(self, stage: Stage) -> int | None:
        """The exit status of a stage, None if time was up before it ended."""
        log = self._folder / f"{stage.name}.log"
        _say(f"{stage.name}: running, {log}")
        left = self._minutes_left()
        command = [word.format(minutes=f"{left:.2f}") for word in stage.command]
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **stage.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            # a benchmark ends by itself, after the case that it is at
            in_time = _wait(process, 60 * left + (GRACE_SECONDS if stage.partial else 0.0))
        status = process.returncode
        for line in log.read_text(errors="replace").splitlines()[-12:]:
            _say(f"    {line}")
        _say(f"{stage.name}: exit status {status}, {time.monotonic() - start:.0f} s")
        return status if in_time or status in stage.partial else None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ends in time; if not, it is interrupted, then killed, with its children."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return False


def stages(
    device: str, folder: Path, results: Path, tests: Sequence[str], bench: Sequence[str]
) -> list[Stage]:
    """What is run on ``device``, "cuda" or "cpu"; ``tests`` and ``bench`` are more arguments."""
    python, on_gpu = sys.executable, device == "cuda"
    pytest = (python, "-m", "pytest")
    install = ("--no-index", "--no-deps", "--no-build-isolation", "--editable", ".")
    only_gpus = "" if on_gpu else "for GPUs only"
    sanitizer = shutil.which("compute-sanitizer")
    return [
        Stage(
            "build",
            (python, "-m", "pip", "install", *install),
            {"FASTUNET_BUILD_CUDA": "1"} if on_gpu else {},
        ),
        Stage(
            "tests",
            (*pytest, "-p", "benchmarks.passed", f"--passed={folder / 'passed'}", *tests),
            good=(0, NO_TESTS),
            needs="build",
        ),
        Stage(
            "sanitizer",
            (str(sanitizer), "--error-exitcode=1", *pytest, *NATIVE_TESTS, "-k", "cuda"),
            # or one allocation of torch's would hold many tensors, and nothing lie outside
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            skip=only_gpus or ("" if sanitizer else "compute-sanitizer is not installed"),
            needs="build",
        ),
        Stage("tune", (python, "-m", "fastunet", "tune"), skip=only_gpus, needs="build"),
        # torch.compile takes minutes for a network, so that it comes when all else is measured
        *(
            Stage(
                name,
                (
                    *(python, "-m", "fastunet", "bench", "--device", device),
                    *("--record", str(results), "--minutes", "{minutes}", *without, *bench),
                ),
                partial=(ROWS_LEFT,),
                skip=skip,
                needs="build",
                least_minutes=LEAST_BENCH_MINUTES,
            )
            for name, without, skip in (
                ("bench", ("--without", "torch.compile") if on_gpu else (), ""),
                ("bench-compiled", (), only_gpus),
            )
        ),
    ]


def digest() -> str:
    """Of the sources and the torch that they are checked with."""
    found = hashlib.sha256(version("torch").encode())
    for top in SOURCES:
        path = ROOT / top
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".toml"):
                found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run the stages."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call, all stages")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", default=(), help="stages; all by default")
    parser.add_argument("--tests", type=shlex.split, default=(), help="arguments for pytest")
    parser.add_argument("--bench", type=shlex.split, default=(), help="and for fastunet bench")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("this torch finds no GPU; --device cpu rehearses without one")
    wanted = stages(
        options.device, options.folder.resolve(), options.results, options.tests, options.bench
    )
    unknown = set(options.only) - {stage.name for stage in wanted}
    if unknown:
        parser.error(f"no stage is called {', '.join(sorted(unknown))}")
    chosen = [stage for stage in wanted if not options.only or stage.name in options.only]
    return Check(options.folder.resolve(), options.minutes, digest()).run(chosen)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
