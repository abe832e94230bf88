"""Recomputed activations: less is kept for backward, and the result stays."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import fastunet
from fastunet import UNet, unet

WIDTHS = (8, 16, 32)


def network(ops: Any, recompute: bool | None, **options: Any) -> UNet:
    torch.manual_seed(0)
    options = {"padding": "same", **options}
    return UNet(1, 2, widths=WIDTHS, ops=ops, recompute=recompute, **options)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "RECOMPUTING", {"cpu"})


def kept_bytes(model: UNet, x: Tensor) -> int:
    """Bytes of all storages that a forward pass keeps for backward, weights not counted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(kept.values())
    # what was kept is alive until here, so that no address was counted for two
    y.sum().backward()
    return total


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("ops", [fastunet.ops, fastunet.ops.eager], ids=["fused", "eager"])
def test_keeps_what_goes_between_the_levels(ops: Any, norm: Any) -> None:
    x = torch.randn(1, 1, 64, 64)
    little = kept_bytes(network(ops, True, norm=norm), x)
    everything = kept_bytes(network(ops, False, norm=norm), x)
    between = 4 * x.numel()
    for level, width in enumerate(WIDTHS):
        pixels = x.numel() // 4**level
        # the output of each pair, twice but at the bottom, and the pooled copy that goes down
        copies = 2 if level < len(WIDTHS) - 1 else 1
        between += 4 * (copies * width * pixels)
        between += 4 * (width * pixels // 4) * (copies - 1)
    assert little <= between < everything
    assert little < 0.6 * everything


def peak_bytes(ops: Any, dtype: torch.dtype) -> int:
    """The most that PyTorch's allocator holds at once of what a training step takes."""
    model = UNet(widths=(32, 64, 128, 256), dropout=0.0, ops=ops).train()
    size = 220
    x = torch.randn(2, 1, size, size).contiguous(memory_format=torch.channels_last)
    side = size - 2 * model.margin
    target, weight = torch.zeros(2, side, side, dtype=torch.long), torch.ones(2, side, side)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = ops.weighted_cross_entropy(model(x), target, weight)
        loss.backward()

    step()
    model.zero_grad()
    with profile(profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_takes_less_memory_than_eager(dtype: torch.dtype) -> None:
    eager = peak_bytes(fastunet.ops.eager, dtype)
    assert 30_000_000 < peak_bytes(fastunet.ops, dtype) < eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_on_a_gpu_keeps_less(
    dtype: torch.dtype, like_a_gpu: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one thread: each has memory of its own for Winograd's algorithm."""
    less = peak_bytes(fastunet.ops, dtype)
    monkeypatch.undo()
    assert 30_000_000 < less < 0.95 * peak_bytes(fastunet.ops, dtype)


def test_a_checkpoint_around_the_network_decides(like_a_gpu: None) -> None:
    x = torch.randn(1, 1, 64, 64)
    kept = []
    for model in (network(fastunet.ops, None), network(fastunet.ops, False)):
        kept.append(kept_bytes(model, x))
        y = checkpoint(model, x, use_reentrant=False)
        y.sum().backward()
    assert kept[0] == kept[1]


@pytest.mark.parametrize("recompute", [True, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batch"},
        {"norm": "batch-after"},
        {"variant": "release"},
        {"padding": "valid"},
        {"odd": "pad"},
        {"up": "bilinear"},
        {"up": "aligned"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_gradients_and_statistics(
    dtype: torch.dtype, options: dict[str, Any], recompute: bool | None, like_a_gpu: None
) -> None:
    x = torch.randn(2, 1, 44, 44)
    states = []
    for each in (False, recompute):
        model = network(fastunet.ops, each, dropout=0.5, **options)
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                y = model(x)
            y.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        states.append({**model.state_dict(), **grads})
    plain, again = states
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


def test_frozen_statistics_stay_frozen() -> None:
    model = network(fastunet.ops, True, norm="batch").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(1, 1, 16, 16)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}


@pytest.mark.parametrize("norm", [None, "batch"])
def test_compiles(norm: Any) -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 1, 16, 20)
    states = []
    torch.compiler.reset()
    for compiled in (False, True):
        model = network(fastunet.ops, True, norm=norm, dropout=0.0)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(x).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        states.append({**model.state_dict(), **grads})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)


def test_is_no_part_of_the_network() -> None:
    model = network(fastunet.ops, True)
    assert model.config == network(fastunet.ops, False).config
