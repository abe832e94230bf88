"""``fastunet.accelerate`` on the U-Nets that people use: same results, and every swap reported."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastunet import accelerate
from fastunet.ops import folding
from fastunet.ops.folding import folded
from fastunet.swapped import on_cpu

from . import networks
from .accelerate_cases import NETWORKS, assert_same, build, outputs
from .accuracy import assert_as_accurate

every_network = pytest.mark.parametrize("name", NETWORKS)


@every_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_results(name: str, training: bool, fused_calls: list[Any]) -> None:
    original, x = build(name)
    original.train(training)
    model, _ = accelerate(copy.deepcopy(original))
    assert_same(model, original, x)
    by_batch = training and any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    everywhere = NETWORKS[name][2] > 0 and not by_batch
    assert bool(fused_calls) == (on_cpu(x) or everywhere)


@every_network
def test_report_names_every_convolution(name: str) -> None:
    model, _ = build(name)
    _, report = accelerate(model)
    *_, swapped, on_cpu, kept = NETWORKS[name]
    assert (len(report.swapped), len(report.on_cpu), len(report.kept)) == (swapped, on_cpu, kept)
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    convs: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    assert {*report.swapped, *report.on_cpu, *report.kept} == set(convs)
    sizes = {nn.Conv2d: ((3, 3), (1, 1)), nn.ConvTranspose2d: ((2, 2), (2, 2))}
    taken = {*report.swapped, *report.on_cpu}
    for conv, module in convs.items():
        assert (conv in taken) == ((module.kernel_size, module.stride) == sizes[type(module)])
    for reason in report.kept.values():
        assert "kernel_size" in reason or "stride" in reason
    for reason in report.on_cpu.values():
        assert "not ReLU" in reason or reason == "no 3x3 convolution is swapped everywhere"
    assert f"{swapped} convolutions run on fastunet, " in str(report)
    assert (f"{on_cpu} on the CPU alone, " in str(report)) == (on_cpu > 0)
    assert f"{kept} as before" in str(report)


@every_network
def test_keys_and_checkpoints_stay(name: str) -> None:
    original = build(name)[0]
    before = original.state_dict()
    model, _ = accelerate(build(name)[0])
    model.load_state_dict(before)
    after = model.eval().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    build(name)[0].load_state_dict(after)


@pytest.mark.parametrize("name", ["classic", "path", "monai basic", "plain"])
def test_wrappers(name: str) -> None:
    torch.use_deterministic_algorithms(False)
    original, x = build(name)
    model, _ = accelerate(copy.deepcopy(original).eval())
    original.eval()
    # MONAI's own forward breaks the graph
    if not name.startswith("monai"):
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled, original, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(again, original, x)
    exact = [y.double() for y in outputs(copy.deepcopy(original).double()(x.double()))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for tensors in zip(outputs(model(x)), outputs(original(x)), exact, strict=True):
            assert_as_accurate(*tensors)
    for dtype in (torch.float16, torch.bfloat16):
        halves = [copy.deepcopy(each).to(dtype)(x.to(dtype)) for each in (model, original)]
        for tensors in zip(*map(outputs, halves), exact, strict=True):
            assert_as_accurate(*tensors)


def test_copies_are_accelerated_and_pickles_are_not(fused_calls: list[Any]) -> None:
    original, x = build("classic")
    model, _ = accelerate(copy.deepcopy(original.eval()))
    assert isinstance(model, networks.ClassicUNet)
    assert repr(model) == repr(original)
    restored = pickle.loads(pickle.dumps(model))
    assert type(restored) is networks.ClassicUNet
    restored(x)
    assert not fused_calls
    copy.deepcopy(model)(x)
    assert fused_calls
    fused_calls.clear()
    accelerate(restored)[0](x)
    accelerate(model)[0](x)
    assert fused_calls


@pytest.fixture
def process_group() -> Iterator[None]:
    dist: Any = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["classic", "path"])
def test_distributed(name: str, process_group: None) -> None:
    original, x = build(name)
    wrapped = DistributedDataParallel(accelerate(copy.deepcopy(original))[0])
    assert_same(wrapped, original, x)
    assert_same(wrapped.eval(), original.eval(), x)


def test_modes_and_steps_are_never_stale(fused_calls: list[Any]) -> None:
    original, x = build("classic")
    model, _ = accelerate(copy.deepcopy(original))
    for _ in range(2):
        for each in (model, original):
            each.train()
            torch.optim.SGD(each.parameters(), lr=0.1).zero_grad()
            each(x).square().mean().backward()
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.eval()
        fused_calls.clear()
        assert_same(model, original, x)
        assert fused_calls
        fused_calls.clear()
    with torch.inference_mode():
        model.train()
        model.eval()
    other = build("classic")[0].eval()
    model.load_state_dict(other.state_dict())
    assert_same(model, other, x)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    other.load_state_dict(model.state_dict())
    assert_same(model, other, x)


def test_layouts() -> None:
    model, x = build("classic")
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    accelerate(model)
    in_order = torch.channels_last if on_cpu() else torch.contiguous_format
    assert all(conv.weight.is_contiguous(memory_format=in_order) for conv in convs)
    model.eval()
    channels_last = torch.channels_last
    assert all(conv.weight.is_contiguous(memory_format=channels_last) for conv in convs)
    assert model(x).is_contiguous()
    y = model(x.contiguous(memory_format=channels_last))
    assert y.is_contiguous(memory_format=channels_last)


@pytest.mark.parametrize("wrong", ["scale", "shift"])
def test_check_can_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def badly(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        weight, bias = folded(conv, norm)
        return (weight * 1.001, bias) if wrong == "scale" else (weight, bias + 0.001)

    monkeypatch.setattr(folding, "folded", badly)
    original, x = build("classic")
    with pytest.raises(AssertionError, match="is above"):
        assert_same(accelerate(copy.deepcopy(original.eval()))[0], original, x)
