"""The command line as a person and a program use it."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import tifffile
import typer
from fastunet_benchmarks import run

import fastunet
from fastunet import cli, demo, load_model, metrics
from fastunet.checkpoint import save_checkpoint
from fastunet.cli import apply, convert, tools, train
from fastunet.data import load_sections, standardise
from fastunet.pages import open_pages
from fastunet.report import read_log
from fastunet.synthetic import write_cells
from fastunet.train import LAST, LOG

COMMANDS: list[Callable[..., Any]] = [
    train.train,
    apply.predict,
    apply.evaluate,
    apply.weight_map,
    convert.convert,
    tools.bench,
    tools.doctor,
    tools.demo,
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_cells(tmp_path_factory.mktemp("data"), pages=3, size=(96, 96), count=6)


@pytest.fixture(scope="module")
def run_folder(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert call(*train_arguments(data, folder), "--val-sections", "2", "--json") == 0
    return folder


def train_arguments(data: tuple[Path, Path], folder: Path) -> list[str]:
    return [
        "train", "--images", str(data[0]), "--labels", str(data[1]), "--output", str(folder),
        "--train-sections", "0-1", "--widths", "4,8,16", "--tile", "60", "--steps", "6",
        "--validate-every", "3", "--quiet",
    ]  # fmt: skip


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastunet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def test_help_names_every_option() -> None:
    for command in COMMANDS:
        assert command.__doc__
        for name, parameter in inspect.signature(command).parameters.items():
            if parameter.annotation is typer.Context:
                continue
            described = [x for x in get_args(parameter.annotation) if getattr(x, "help", None)]
            assert described, f"{command.__name__}: {name} has no help"


def test_train_json(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*train_arguments(data, tmp_path), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 6
    assert Path(result["checkpoint"]).exists()
    assert Path(result["curve"]).stat().st_size > 1000


@pytest.mark.parametrize("kind", ["probability", "label", "instances"])
def test_predict(kind: str, data: tuple[Path, Path], run_folder: Path, tmp_path: Path) -> None:
    output, overlay = tmp_path / "out.tif", tmp_path / "overlays"
    assert call(
        "predict", data[0], "--checkpoint", run_folder / LAST, "-o", output, "--kind", kind,
        "--overlay", overlay, "--tile", "76", "--batch", "2", "--quiet",
    ) == 0  # fmt: skip
    pages = tifffile.imread(output)
    assert pages.shape == (3, 96, 96)
    dtypes = {"probability": np.float32, "label": np.uint8, "instances": np.uint16}
    assert pages.dtype == dtypes[kind]
    assert kind == "instances" or pages.max() <= 1
    assert len(list(overlay.glob("*.png"))) == 3


def test_evaluate(
    data: tuple[Path, Path], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate", "--images", data[0], "--labels", data[1], "--checkpoint", run_folder / LAST,
        "--sections", "1-",
    ]  # fmt: skip
    assert call(*arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["pages"]) == 2
    errors = [page["pixel_error"] for page in result["pages"].values()]
    assert result["mean"]["pixel_error"] == pytest.approx(np.mean(errors))
    assert result["mean"]["challenge"] is None
    assert call(*arguments, "--challenge", "--json") == 0
    challenge = json.loads(capsys.readouterr().out)["mean"]["challenge"]
    curve = challenge["v_rand"]
    best = challenge["maximal_v_rand"]
    assert best["score"] == max(point["score"] for point in curve.values())
    assert curve[str(best["threshold"])]["score"] == best["score"]
    assert call(*arguments, "--challenge") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("pixel error", "V_Rand, borders", "SEG", "warping error", "maximal V_Info"):
        assert name in printed


def test_options_of_prediction_arrive(
    data: tuple[Path, Path], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, page = load_model(run_folder / LAST), open_pages(data[0]).page(0)
    p = fastunet.predict(model, standardise(page), tta=True)
    output = tmp_path / "out.tif"
    arguments = ["--checkpoint", run_folder / LAST, "--tta", "--device", "cpu"]
    assert call("predict", data[0], *arguments, "-o", output, "--quiet") == 0
    assert np.array_equal(tifffile.imread(output)[0], p[1])
    options = ["--kind", "instances", "--threshold", "0.45", "--seed-threshold", "0.5"]
    assert call("predict", data[0], *arguments, "-o", output, *options, "--smooth", "0.7") == 0
    ids = metrics.instances(
        p, method="watershed", threshold=0.45, seed_threshold=0.5, smooth_px=0.7
    )
    assert np.array_equal(tifffile.imread(output)[0], ids)
    assert call("predict", data[0], *arguments, "-o", output, *options, "--border-class", "1") == 2
    assert "border_class must be of three classes" in capsys.readouterr().err
    score = ["evaluate", "--images", data[0], "--labels", data[1], "--sections", "0", "--json"]
    assert call(*score, *arguments) == 0
    found = json.loads(capsys.readouterr().out)["mean"]
    section = load_sections(*data, sections="0")[0]
    expected = metrics.score(p, section.classes, section.cells, method="watershed")
    assert found == json.loads(json.dumps(expected.to_dict()))


def test_several_checkpoints(
    data: tuple[Path, Path], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [run_folder / LAST, tmp_path / "narrow.safetensors"]
    save_checkpoint(paths[1], fastunet.UNet(widths=(2, 3, 4)))
    models, section = [load_model(path) for path in paths], load_sections(*data, sections="0")[0]
    p = fastunet.predict(models, section.image)
    arguments = ["--checkpoint", paths[0], "--checkpoint", paths[1], "--device", "cpu", "--json"]
    output = tmp_path / "out.tif"
    assert call("predict", data[0], *arguments, "-o", output) == 0
    assert json.loads(capsys.readouterr().out) == {
        "pages": 3,
        "output": str(output),
        "overlay": None,
    }
    assert np.array_equal(tifffile.imread(output)[0], p[1])
    assert not np.array_equal(p, fastunet.predict(models[0], section.image))
    score = ["evaluate", "--images", data[0], "--labels", data[1], "--sections", "0"]
    assert call(*score, *arguments) == 0
    expected = metrics.score(p, section.classes, section.cells, method="watershed")
    found = json.loads(capsys.readouterr().out)["mean"]
    assert found == json.loads(json.dumps(expected.to_dict()))


def test_weight_map(data: tuple[Path, Path], tmp_path: Path) -> None:
    output, picture = tmp_path / "weights.tif", tmp_path / "weights.png"
    assert call("weight-map", data[1], "-o", output, "--png", picture, "--quiet") == 0
    weights = tifffile.imread(output)
    assert weights.shape == (3, 96, 96)
    assert weights.dtype == np.float32
    assert weights.max() > 8
    assert picture.stat().st_size > 1000


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["operator"] for row in facts["operators"]} >= {"conv_relu", "weight_map"}
    assert call("doctor") == 0
    assert "served by" in capsys.readouterr().out


def bad_calls(data: tuple[Path, Path], run: Path, tmp: Path) -> list[tuple[list[Any], str]]:
    images, labels = data
    both = ["--images", images, "--labels", labels]
    text = tmp / "text.tif"
    text.write_text("not a picture")
    return [
        (["train"], "Missing option '--images'"),
        (["train", *both, "--steps", "many"], "Invalid value for '--steps'"),
        (["train", *both, "--widths", "4;8"], "--widths must be integers joined by commas"),
        (["train", *both, "--tile", "61"], "the nearest that fit"),
        (["train", *both, "--train-sections", "0-9"], "'0-9'"),
        (["train", *both, "--device", "abacus"], "device 'abacus' cannot be used"),
        (["train", *both, "--lr", "0"], "lr must be > 0"),
        (["train", *both, "--output", run], "already holds a run"),
        (["train", "--images", tmp / "no.tif", "--labels", labels], "no.tif"),
        (["train", "--images", text, "--labels", labels], "text.tif"),
        (["predict", images], "Missing option '--checkpoint'"),
        (["predict", images, "--checkpoint", text], "text.tif"),
        (["predict", text, "--checkpoint", run / LAST], "text.tif"),
        (["predict", images, "--checkpoint", run / LAST, "--tile", "61"], "tile must fit"),
        (["predict", images, "--checkpoint", run / LAST, "-o", tmp / "a.jpg"], ".tif"),
        (["evaluate", *both, "--checkpoint", run / LAST, "--sections", "7"], "'7'"),
        (["weight-map", text, "-o", tmp / "w.tif"], "text.tif"),
        (["weight-map", labels, "-o", tmp / "w.tif", "--sigma", "0"], "sigma"),
        (["bench", "no_such_operator"], "no_such_operator"),
        (["nonsense"], "No such command 'nonsense'"),
    ]


def test_bad_input_is_one_line_and_exit_code_2(
    data: tuple[Path, Path],
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in bad_calls(data, run_folder, tmp_path):
        assert call(*arguments) == 2, arguments
        printed = capsys.readouterr()
        assert printed.out == "", arguments
        assert printed.err.startswith("fastunet: error: "), arguments
        assert printed.err.count("\n") == 1, arguments
        assert message in printed.err, arguments
    # nothing half-done is left behind
    assert [path.name for path in tmp_path.iterdir()] == ["text.tif"]


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["fastunet", "predict", str(tmp_path), "--checkpoint", "x", "--debug"]
    )
    with pytest.raises(ValueError, match="wanted"):
        cli.main()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupted_bench_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    time_cases, seen = run.time_cases, []

    def interrupted(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return time_cases(*arguments)

    monkeypatch.setattr(run, "time_cases", interrupted)
    before = signal.getsignal(signal.SIGINT)
    options = ["--device", "cpu", "--size", 32, "--batch", 1, "--batch", 2]
    assert call("bench", "separate_touching", *options, "--record", tmp_path) == 3
    assert "3 cases are left" in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.glob("*/speedup-separate_touching-*.png"))
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_saves_and_leaves(data: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastunet", *train_arguments(data, tmp_path)]
    command[command.index("--steps") + 1] = "100000"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not read_log(tmp_path / LOG) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in printed
    assert "Traceback" not in printed
    assert (tmp_path / LAST).exists()


def test_interrupted_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(stopped_by=signal.SIGINT)

    monkeypatch.setattr(demo, "fit", interrupted)
    assert call("demo", "--output", tmp_path) == 128 + signal.SIGINT
    assert "the same command starts it anew" in capsys.readouterr().err
