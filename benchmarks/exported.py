"""Prediction by engines that run an exported network: ONNX Runtime and OpenVINO, on the CPU."""

import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Call, Contender, Inputs, Setting

# OpenVINO's names of precisions
OPENVINO_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

Network = Callable[[], nn.Module]


def engines(network: Network, dtype: torch.dtype, setting: Setting) -> tuple[Contender, ...]:
    """Contenders that predict ``Inputs["images"]`` in ``dtype`` by what ``network`` makes."""
    on_cpu = setting.device.type == "cpu"
    absent = _why_not("onnx", "onnxscript") if on_cpu else "compared on the CPU only"

    def onnxruntime(sets: Sequence[Inputs]) -> Sequence[Call]:
        run = _onnxruntime(_onnx(network(), sets[0]["images"]))
        return [_bind(run, inputs["images"]) for inputs in sets]

    def openvino(sets: Sequence[Inputs]) -> Sequence[Call]:
        run = _openvino(_onnx(network(), sets[0]["images"]), dtype)
        return [_bind(run, inputs["images"]) for inputs in sets]

    return (
        Contender(
            "ONNX Runtime",
            onnxruntime,
            backend="onnxruntime",
            skip=absent
            or _why_not("onnxruntime")
            or (None if dtype == torch.float32 else "its convolutions on CPUs are float32"),
        ),
        Contender("OpenVINO", openvino, backend="openvino", skip=absent or _why_not("openvino")),
    )


def _why_not(*packages: str) -> str | None:
    missing = [package for package in packages if find_spec(package) is None]
    return f"{' and '.join(missing)} is not installed" if missing else None


def _bind(run: Callable[[Any], Any], images: Tensor) -> Call:
    array = images.clone().numpy()
    return lambda: (torch.from_numpy(run(array)),)


def _onnx(network: nn.Module, images: Tensor) -> bytes:
    """The network in evaluation as a file in memory."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(network.eval(), (images,), dynamo=True, verbose=False)
    finally:
        exporter.setLevel(before)
    assert program is not None
    return program.model_proto.SerializeToString()


def _onnxruntime(model: bytes) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # what waits for its next turn shall not take the others' cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(model: bytes, dtype: torch.dtype) -> Callable[[Any], Any]:
    """OpenVINO's precision is the processor's favourite unless it is told."""
    import openvino

    precision = OPENVINO_PRECISIONS[dtype]
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if chosen != precision:
        raise ValueError(f"OpenVINO computes in {chosen} here, not in {precision}")
    request = compiled.create_infer_request()
    # a copy of the result, as the others give
    return lambda images: request.infer([images], share_inputs=True)[0]
