"""The network as a graph: compiled, exported and reloaded, in ONNX."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet import UNet

from .accuracy import assert_as_accurate

VARIANTS: list[dict[str, Any]] = [
    {},
    {"variant": "release", "odd": "crop"},
    {"padding": "same", "norm": "batch", "up": "bilinear"},
    {"padding": "same", "norm": "batch-after", "odd": "pad", "activation": "sigmoid"},
    {"padding": "same", "odd": "pad", "up": "aligned"},
]


def network(ops: Any = fastunet.ops, **options: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(2, 3, widths=(4, 8, 16), ops=ops, dropout=0.0, **options)


OPTIONS = {"padding", "norm", "up", "variant", "odd", "activation"}


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    """Tests of one network would use up the number of its graphs."""
    torch.compiler.reset()


def exact(model: UNet, x: Tensor) -> Tensor:
    twin = network(fastunet.ops.eager, **{k: v for k, v in model.config.items() if k in OPTIONS})
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return twin.double().train(model.training)(x.double())


def sizes() -> dict[int, Any]:
    """Heights and widths that fit a network of three levels."""
    return {
        2: 4 * torch.export.Dim("rows", min=11, max=64),
        3: 4 * torch.export.Dim("columns", min=11, max=64),
    }


@pytest.mark.parametrize(
    ("options", "training"),
    [(VARIANTS[0], False), (VARIANTS[1], True), (VARIANTS[2], True), (VARIANTS[3], False)],
    ids=str,
)
def test_compile_of_any_size(options: dict[str, Any], training: bool) -> None:
    torch.use_deterministic_algorithms(False)
    model = network(**options).train(training)
    start = copy.deepcopy(model.state_dict())
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=counting, dynamic=True)
    for height, width in ((60, 76), (84, 64)):
        x = torch.randn(2, 2, height, width)
        results = []
        for run in (compiled, model):
            model.load_state_dict(start)
            model.zero_grad()
            y = run(x)
            y.square().mean().backward()
            results.append((y.detach(), [p.grad for p in model.parameters()]))
        model.load_state_dict(start)
        (got, got_grads), (eager, grads) = results
        assert_as_accurate(got, eager, exact(model, x))
        for a, b in zip(got_grads, grads, strict=True):
            torch.testing.assert_close(a, b)
    # the sizes share a graph
    assert graphs == 1


@pytest.mark.slow
def test_compiles_to_machine_code() -> None:
    torch.use_deterministic_algorithms(False)
    model = network(padding="same").eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in (16, 24):
            x = torch.randn(1, 2, size, size + 4)
            assert_as_accurate(compiled(x), model(x), exact(model, x))


RELOAD = """
import sys, torch
name, *folders = sys.argv[1:]
if name == "fused":
    import fastunet
for folder in folders:
    run = torch.export.load(folder + "/model.pt2").module()
    results = [run(x) for x in torch.load(folder + "/images.pt")]
    torch.save(results, folder + "/results.pt")
assert ("fastunet" in sys.modules) == (name == "fused")
"""


@pytest.mark.parametrize("name", ["fused", "eager"])
def test_export_and_reload_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    images = [torch.randn(1, 2, *size) for size in ((60, 52), (44, 88))]
    models = {}
    for number, options in enumerate(VARIANTS[:1] + VARIANTS[2:3]):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = network(fastunet.ops if name == "fused" else fastunet.ops.eager, **options).eval()
        program = torch.export.export(model, (images[0],), dynamic_shapes=(sizes(),))
        torch.export.save(program, folder / "model.pt2")
        torch.save(images, folder / "images.pt")
        models[folder] = model
    subprocess.run([sys.executable, "-c", RELOAD, name, *map(str, models)], check=True)
    for folder, model in models.items():
        for x, y in zip(images, torch.load(folder / "results.pt"), strict=True):
            with torch.no_grad():
                assert_as_accurate(y, model(x), exact(model, x))


@pytest.mark.parametrize("options", VARIANTS[1:4], ids=str)
def test_onnx_runs_to_the_same_result(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = network(fastunet.ops.eager, **options).eval()
    path = tmp_path / "model.onnx"
    example = (torch.randn(1, 2, 60, 52),)
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=(sizes(),), verbose=False)
    session = runtime.InferenceSession(path)
    for size in ((60, 52), (44, 88)):
        x = torch.randn(1, 2, *size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert_as_accurate(torch.from_numpy(y), model(x), exact(model, x))
