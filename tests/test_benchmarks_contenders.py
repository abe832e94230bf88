"""Contenders that are optional: exported engines, cuCIM, frozen weights."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_unet, exported
from benchmarks.cases import Case, Contender, Setting
from benchmarks.checks import Judge
from benchmarks.ops import bench_weight_map
from benchmarks.timing import Clock
from fastunet import UNet, ops

CPU = torch.device("cpu")
SETTING = Setting(CPU, (torch.float32, torch.bfloat16), sizes=(188,), quick=True)
ENGINES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def named(case: Case, name: str) -> Contender:
    return next(contender for contender in case.contenders if contender.name == name)


def predictions() -> list[Case]:
    return [case for case in bench_unet.cases(SETTING) if case.name.endswith("prediction")]


@pytest.mark.parametrize("name", ENGINES)
def test_engines_compute_the_network(name: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip(ENGINES[name])
    for case in predictions():
        contender = named(case, name)
        if contender.skip:
            assert case.dtype == torch.bfloat16
            assert contender.skip == "its convolutions on CPUs are float32"
        else:
            trial = Judge(case, Clock(CPU)).admit(contender)
            assert trial.backend == ENGINES[name]


def test_precision_is_the_row_s() -> None:
    """OpenVINO would take bfloat16 for both where the processor has it."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    model = UNet(widths=(2, 4), dropout=0.0, ops=ops.eager).eval()
    images = torch.randn(1, 1, 20, 20)
    exact = model(images).detach().numpy()
    run = exported._openvino(exported._onnx(model, images), torch.float32)
    np.testing.assert_allclose(run(images.numpy()), exact, rtol=1e-3, atol=1e-5)


def test_engines_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: None if name == "openvino" else name)
    case, *_ = predictions()
    assert named(case, "OpenVINO").skip == "openvino is not installed"
    assert named(case, "ONNX Runtime").skip is None
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    case, *_ = predictions()
    missing = "onnx and onnxscript is not installed"
    assert {named(case, name).skip for name in ENGINES} == {missing}


def test_training_has_no_engines() -> None:
    training = bench_unet.cases(SETTING)[-1]
    assert not {contender.name for contender in training.contenders} & set(ENGINES)
    assert named(training, "torch.compile freezing").skip == "it has no gradient"


@pytest.mark.slow
def test_compiled_networks_agree() -> None:
    full = Setting(CPU, (torch.float32,), sizes=(188,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_unet, "PAPER_WIDTHS", (4, 8, 8, 8, 8))
        case, *_ = bench_unet.cases(full)
    judge = Judge(case, Clock(CPU))
    for name in ("torch.compile", "torch.compile freezing"):
        assert judge.admit(named(case, name)).backend == "inductor"


def test_cucim_s_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy for CuPy and scipy for cuCIM, whose functions have the same names."""
    module: Any = ModuleType("cucim.core.operations.morphology")
    module.distance_transform_edt = bench_weight_map.scipy_distance
    monkeypatch.setitem(sys.modules, "cupy", np)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    case, *_ = bench_weight_map.cases(Setting(CPU, (torch.float32,), sizes=(32,), quick=True))
    given = case.inputs()
    (weights,) = bench_weight_map.prepare_cucim(given)()
    torch.testing.assert_close(weights.double(), case.exact(given)[0], rtol=1e-5, atol=1e-5)


def test_exact_of_a_batch_is_that_of_its_images() -> None:
    setting = Setting(CPU, (torch.float32,), sizes=(188,), batches=(2,), quick=True)
    for case in bench_unet.cases(setting):
        judge = Judge(case, Clock(CPU))
        assert judge.admit(case.contenders[0]).errors
