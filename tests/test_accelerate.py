"""``fastunet.accelerate`` on the U-Nets that people use: same results, and every swap reported."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastunet
from fastunet import accelerate, fusion

from . import networks, networks_more
from .accuracy import assert_as_accurate, root_sum_square

Build = Callable[[], nn.Module]


def monai(name: str, **options: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    options = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, **options}
    return getattr(nets, name)(**options)


BASIC = {"features": (8, 8, 16, 32, 64, 8)}
LEVELS = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}
RELU = {"act": "relu", "norm": "batch"}
# how to build it, a size that it takes, and its swapped and kept convolutions
NETWORKS: dict[str, tuple[Build, tuple[int, int], int, int]] = {
    "classic": (lambda: networks.ClassicUNet(3, 2, width=8), (45, 67), 18, 1),
    "classic bilinear": (lambda: networks.ClassicUNet(3, 2, True, width=8), (45, 67), 18, 1),
    "path": (lambda: networks.PathUNet(3, 2, 3, 3), (61, 67), 10, 1),
    "path norm": (lambda: networks.PathUNet(3, 2, 3, 3, True, True, "upsample"), (45, 67), 10, 3),
    "hub": (lambda: networks.HubUNet(3, 1, 8), (48, 80), 18, 1),
    "monai basic": (lambda: monai("BasicUNet", **BASIC, **RELU), (45, 67), 18, 1),
    "monai": (lambda: monai("UNet", **LEVELS, **RELU), (44, 68), 5, 6),
    "segmentation": (lambda: networks_more.SegmentationUnet(3, 2, 8), (32, 96), 23, 24),
    "nested": (lambda: networks_more.NestedUNet(2, 3, width=8), (48, 80), 30, 1),
    "nested deep": (lambda: networks_more.NestedUNet(2, 3, True, width=8), (48, 80), 30, 4),
    "attention": (lambda: networks_more.AttentionUNet(3, 2, width=8), (48, 80), 22, 13),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network with statistics and biases that matter, in training mode, and an image."""
    make, size, *_ = NETWORKS[name]
    return randomised(make()), torch.randn(2, 3, *size)


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for name in ("weight", "running_var"):
                nn.init.uniform_(state[name], 0.5, 1.5)
            for name in ("bias", "running_mean"):
                nn.init.normal_(state[name], std=0.3)
    return model


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def gradients(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Outputs, all gradients of their weighted sum in one vector, and buffers."""
    x = x.detach().requires_grad_()
    results = outputs(model(x))
    generator = torch.Generator().manual_seed(0)
    weighted = [
        (result * torch.randn(result.shape, generator=generator).to(result)).sum()
        for result in results
    ]
    grads = torch.autograd.grad(sum(weighted, x.new_zeros(())), [x, *model.parameters()])
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return results, torch.cat([grad.flatten() for grad in grads]), buffers


def assert_same(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and buffers of ``model`` are as accurate as those of ``original``."""
    exact_model = copy.deepcopy(original).double()
    actual, eager, exact = (
        gradients(each, image)
        for each, image in ((model, x), (original, x), (exact_model, x.double()))
    )
    for which in (0, 2):
        for tensors in zip(actual[which], eager[which], exact[which], strict=True):
            assert_as_accurate(*tensors)
    assert_as_accurate(actual[1], eager[1], exact[1], root_sum_square)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call of ``conv_relu`` that an accelerated model makes."""
    calls: list[Any] = []

    def conv_relu(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return fastunet.conv_relu(*args, **options)

    monkeypatch.setattr(fusion, "conv_relu", conv_relu)
    return calls


def relu_conv(c: int = 4, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(c, c, 3, padding=1, **options), nn.ReLU()]


class Forward(nn.Module):
    """A convolution, normalisation, ReLU and pooling, joined by a function of them and x."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.flag = True
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@every_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_results(name: str, training: bool, fused_calls: list[Any]) -> None:
    original, x = build(name)
    original.train(training)
    model, _ = accelerate(copy.deepcopy(original))
    assert_same(model, original, x)
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert bool(fused_calls) == (not training or not normalised)


@every_network
def test_report_names_every_convolution(name: str) -> None:
    model, _ = build(name)
    _, report = accelerate(model)
    *_, swapped, kept = NETWORKS[name]
    assert (len(report.swapped), len(report.kept)) == (swapped, kept)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {*report.swapped, *report.kept} == set(convs)
    assert all(convs[conv].kernel_size == (3, 3) for conv in report.swapped)
    for conv, reason in report.kept.items():
        other = "kernel_size" in reason or "stride" in reason
        assert other == (convs[conv].kernel_size != (3, 3) or convs[conv].stride != (1, 1))
        assert other or reason in ("followed by add, not ReLU", "followed by the output, not ReLU")
    assert f"{swapped} convolutions run on fastunet, {kept} as before" in str(report)


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


@pytest.mark.parametrize("name", ["classic", "path", "monai basic"])
def test_wrappers(name: str) -> None:
    torch.use_deterministic_algorithms(False)
    original, x = build(name)
    model, _ = accelerate(copy.deepcopy(original).eval())
    original.eval()
    # MONAI's own forward breaks the graph
    options: Any = {"fullgraph": not name.startswith("monai"), "backend": "aot_eager"}
    compiled: Any = torch.compile(model, **options)
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
        assert not fused_calls
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
    assert all(conv.weight.is_contiguous() for conv in convs)
    model.eval()
    channels_last = torch.channels_last
    assert all(conv.weight.is_contiguous(memory_format=channels_last) for conv in convs)
    assert model(x).is_contiguous()
    y = model(x.contiguous(memory_format=channels_last))
    assert y.is_contiguous(memory_format=channels_last)


def test_folding_is_left_where_it_costs_more_than_it_saves(fused_calls: list[Any]) -> None:
    model, _ = accelerate(nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval())
    model(torch.randn(1, 4, 6, 6))
    assert len(fused_calls) == 1
    model(torch.randn(1, 4, 5, 7))
    assert len(fused_calls) == 1


def cat_then_conv(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.conv(torch.cat([x[:, :3], x[:, 3:]], dim=1)))


FUSED: dict[str, tuple[Callable[[Any, Any], Any], dict[str, bool]]] = {
    "function": (lambda m, x: torch.relu(m.conv(x)), {}),
    "method": (lambda m, x: m.norm(m.conv(x)).relu_(), {}),
    "cat": (cat_then_conv, {"skip": True}),
    "pool": (lambda m, x: m.pool(m.relu(m.conv(x))), {"pool": True}),
    "pool and skip": (
        lambda m, x: (y := m.relu(m.norm(m.conv(x))), nn.functional.max_pool2d(y, 2)),
        {"pool": True},
    ),
    "pool of another stride": (lambda m, x: nn.functional.max_pool2d(m.relu(m.conv(x)), 2, 1), {}),
    "changed before the pool": (lambda m, x: m.pool(m.relu(m.conv(x)).mul_(-1)), {}),
    "changed beside the pool": (
        lambda m, x: (y := m.relu(m.norm(m.conv(x))), y.mul_(-1), m.pool(y))[2],
        {},
    ),
    "shared ReLU": (lambda m, x: m.relu(m.norm(x) - m.relu(m.conv(x))), {}),
    "changed after the cat": (
        lambda m, x: (
            a := m.norm(x), c := torch.cat([a, a], 1), a.mul_(2), m.relu(m.conv(c[:, 2:6]))
        )[3],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fuses(name: str, fused_calls: list[Any]) -> None:
    function, options = FUSED[name]
    original = randomised(Forward(function)).eval()
    model, report = accelerate(copy.deepcopy(original))
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad():
        exact = outputs(copy.deepcopy(original).double()(x.double()))
        for tensors in zip(outputs(model(x)), outputs(original(x)), exact, strict=True):
            assert_as_accurate(*tensors)
    assert report.swapped == ("conv",)
    ((got),) = fused_calls
    assert (got["skip"] is not None) == options.get("skip", False)
    assert got["pool"] == options.get("pool", False)


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = x * 2
    return m.relu(m.conv(x))


def sets_attribute(m: Any, x: Tensor) -> Tensor:
    m.seen = m.relu(m.conv(x))
    return m.seen * 2


UNREAD: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "control flow": (lambda m, x: m.relu(m.conv(x)) if x.sum() > 0 else x, "control flow"),
    "type": (lambda m, x: m.relu(m.conv(x)) if isinstance(x, Tensor) else x, "for its type"),
    "training": (lambda m, x: m.relu(m.conv(x)) if m.training else m.conv(x), "in training"),
    "modes": (without_gradients, "it switches gradients"),
    "attribute": (sets_attribute, "it sets attributes"),
    "tensor": (lambda m, x: m.relu(m.conv(x)) * torch.ones(1), "tensors of its own"),
}
NOT_FUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "used twice": (lambda m, x: (y := m.conv(x)) + torch.relu(y), "its Conv2d is used more"),
    "twice by one": (lambda m, x: (y := m.conv(x)) * y, "its Conv2d is used more"),
    "norm used twice": (
        lambda m, x: (y := m.norm(m.conv(x))) + y.relu(),
        "its BatchNorm2d is used",
    ),
    "changed in place": (lambda m, x: (y := m.conv(x)) + m.relu(y), "its Conv2d is used more"),
    "no ReLU": (lambda m, x: m.conv(x), "followed by the output, not ReLU"),
    "leaky": (lambda m, x: nn.functional.leaky_relu(m.conv(x)), "followed by leaky_relu"),
    "two norms": (lambda m, x: m.relu(m.norm(m.norm(m.conv(x)))), "more than one BatchNorm2d"),
    "never called": (lambda m, x: m.relu(m.norm(x)), "no forward that could be read calls it"),
}


@pytest.mark.parametrize("name", [*UNREAD, *NOT_FUSED])
def test_leaves_alone(name: str, fused_calls: list[Any]) -> None:
    function, reason = {**UNREAD, **NOT_FUSED}[name]
    original = randomised(Forward(function)).eval()
    model, report = accelerate(copy.deepcopy(original))
    assert not report.swapped
    assert type(model) is Forward
    assert list(vars(model)) == list(vars(original))
    assert reason in (str(report.notes) if name in UNREAD else report.kept["conv"])
    x = torch.randn(2, 4, 9, 7)
    assert torch.equal(model(x), original(x))
    assert not fused_calls


class Same(nn.Conv2d):
    """A class of somebody else's."""


def test_layers_that_do_not_qualify() -> None:
    layers: list[tuple[nn.Module, nn.Module, str]] = [
        (nn.Conv2d(4, 4, 1), nn.ReLU(), "kernel_size (1, 1)"),
        (nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), "stride (2, 2)"),
        (nn.Conv2d(4, 4, 3, dilation=2), nn.ReLU(), "dilation (2, 2)"),
        (nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), "groups 2"),
        (nn.Conv2d(4, 4, 3, padding=2), nn.ReLU(), "padding (2, 2)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), "padding mode reflect"),
        (Same(4, 4, 3), nn.ReLU(), "a Same is not a plain Conv2d"),
        (nn.Conv2d(4, 4, 3), nn.ReLU6(), "followed by ReLU6, not ReLU"),
        (nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), "followed by InstanceNorm2d, not ReLU"),
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), "running statistics"),
    ]
    for conv, after, reason in layers:
        _, report = accelerate(nn.Sequential(conv, after, nn.ReLU()))
        assert reason in report.kept["0"]
    _, report = accelerate(nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU()))
    assert report.swapped == ("0",)
    _, report = accelerate(nn.Sequential(*relu_conv(), nn.GroupNorm(2, 4)))
    assert "GroupNorm" in report.kept["0"]


def test_hooks_run(fused_calls: list[Any]) -> None:
    x = torch.randn(1, 4, 8, 8)
    for position in (0, 1):
        seen: list[Tensor] = []
        model = nn.Sequential(nn.Sequential(*relu_conv()), nn.Sequential(*relu_conv()))
        twin: Any = copy.deepcopy(model)
        twin = twin.to(memory_format=torch.channels_last)
        model.get_submodule(f"0.{position}").register_forward_hook(
            lambda _, __, y, seen=seen: seen.append(y.clone())
        )
        _, report = accelerate(model)
        assert "hooks" in report.kept["0.0"]
        assert report.swapped == ("1.0",)
        model(x)
        assert torch.equal(seen[0], twin[0][: position + 1](x))
    # and those that come later: on a layer, and on a block
    for part in ("0.0", "0.1", "0"):
        model = nn.Sequential(nn.Sequential(*relu_conv()), nn.Sequential(*relu_conv()))
        accelerate(model)
        fired: list[int] = []
        fused_calls.clear()
        model(x)
        assert len(fused_calls) == 2
        handle = model.get_submodule(part).register_forward_hook(
            lambda *_, fired=fired: fired.append(1)
        )
        model(x)
        assert fired == [1]
        handle.remove()
        fused_calls.clear()
        model(x)
        assert len(fused_calls) == 2


def test_later_changes_of_the_model() -> None:
    deep, x = build("nested deep")
    model, _ = accelerate(deep.eval())
    assert isinstance(model(x), list)
    setattr(model, "deep_supervision", False)  # noqa: B010
    model.final = nn.Conv2d(8, 2, 1)
    assert isinstance(model(x), Tensor)

    def changed(change: Callable[[Any], None]) -> None:
        original = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *relu_conv()
        ).eval()
        model, _ = accelerate(copy.deepcopy(randomised(original)))
        for each in (original, model):
            change(each)
        x = torch.randn(2, 4, 20, 20)
        assert_same(model, original, x)

    stride = nn.Conv2d(4, 4, 3, stride=2)
    changed(lambda m: m.__setitem__(0, copy.deepcopy(stride)))
    changed(lambda m: m.__setitem__(1, nn.InstanceNorm2d(4)))
    changed(lambda m: m.__setitem__(2, nn.Tanh()))
    changed(lambda m: m.append(nn.Sigmoid()))
    changed(lambda m: m.__delitem__(4))
    changed(lambda m: setattr(m[0], "padding", (0, 0)))
    changed(lambda m: nn.utils.parametrizations.weight_norm(m[0]))


def test_other_inputs() -> None:
    model, report = accelerate(nn.Sequential(*relu_conv()))
    twin = copy.deepcopy(model.get_submodule("0"))
    image = torch.randn(4, 6, 5)
    assert torch.equal(model(image), torch.relu(twin(image)))
    assert torch.equal(model(input=image), model(image))
    assert report.notes == ()
    assert str(report) == "1 convolutions run on fastunet, 0 as before\n  swapped  0"


def test_rejects() -> None:
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got int"):
        accelerate(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["scale", "shift"])
def test_check_can_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = fusion.folded

    def badly(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        weight, bias = folded(conv, norm)
        return (weight * 1.001, bias) if wrong == "scale" else (weight, bias + 0.001)

    monkeypatch.setattr(fusion, "folded", badly)
    original, x = build("classic")
    with pytest.raises(AssertionError, match="is above"):
        assert_same(accelerate(copy.deepcopy(original.eval()))[0], original, x)
