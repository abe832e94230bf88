"""What ``fastunet.accelerate`` fuses, and what it leaves alone: a small network for each rule."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastunet import accelerate
from fastunet.ops import folding
from fastunet.swapped import on_cpu

from .accelerate_cases import assert_same, build, outputs, randomised
from .accuracy import assert_as_accurate


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
        self.by_image = nn.InstanceNorm2d(4, affine=True)
        self.leaky = nn.LeakyReLU(0.1)
        self.drop = nn.Dropout(0.5)
        self.flag = True
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_folding_is_left_where_it_costs_more_than_it_saves(fused_calls: list[Any]) -> None:
    model, _ = accelerate(nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval())
    model(torch.randn(1, 4, 6, 6))
    model(torch.randn(1, 4, 5, 7))
    # the convolution with its ReLU, then the convolution alone
    assert ["pool" in options for options in fused_calls] == [True, False]


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
# why a GPU leaves them alone
ON_CPU: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "used twice": (lambda m, x: (y := m.conv(x)) + torch.relu(y), "its Conv2d is used more"),
    "twice by one": (lambda m, x: (y := m.conv(x)) * y, "its Conv2d is used more"),
    "norm used twice": (
        lambda m, x: (y := m.norm(m.conv(x))) + y.relu(),
        "its BatchNorm2d is used",
    ),
    "changed in place": (lambda m, x: (y := m.conv(x)) + m.relu(y), "its Conv2d is used more"),
    "no ReLU": (lambda m, x: m.conv(x), "followed by the output, not ReLU"),
    "leaky": (lambda m, x: nn.functional.leaky_relu(m.conv(x)), "followed by LeakyReLU"),
    "leaky and pool": (
        lambda m, x: m.pool(nn.functional.leaky_relu(m.norm(m.conv(x)), 0.2, True)),
        "followed by LeakyReLU",
    ),
    "leaky, changed": (
        lambda m, x: nn.functional.leaky_relu(m.conv(x), negative_slope=0.3).mul_(2),
        "followed by LeakyReLU",
    ),
    "leaky the other way": (
        lambda m, x: nn.functional.leaky_relu(m.conv(x), -0.1),
        "followed by leaky_relu, not ReLU",
    ),
    "dropout and no ReLU": (lambda m, x: m.drop(m.conv(x)).tanh(), "followed by tanh, not ReLU"),
    "two norms": (lambda m, x: m.relu(m.norm(m.norm(m.conv(x)))), "more than one normalisation"),
    "by image": (lambda m, x: m.pool(m.relu(m.by_image(m.conv(x)))), "followed by InstanceNorm2d"),
    "by image, leaky, cat": (
        lambda m, x: m.leaky(m.by_image(m.conv(torch.cat([x[:, :3], x[:, 3:]], 1)))),
        "followed by InstanceNorm2d",
    ),
    "by image and tanh": (lambda m, x: m.by_image(m.conv(x)).tanh(), "followed by tanh, not ReLU"),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ON_CPU)
def test_runs_on_the_cpu(
    name: str, training: bool, fused_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "FEW_ELEMENTS", 0)
    function, reason = ON_CPU[name]
    original: Any = randomised(Forward(function)).train(training)
    # a dropout that drops is the original's
    original.drop.p = 0.0 if training else 0.5
    model, report = accelerate(copy.deepcopy(original))
    assert not report.swapped
    assert reason in report.on_cpu["conv"]
    x = torch.randn(2, 4, 18, 14)
    assert_same(model, original, x)
    assert bool(fused_calls) == on_cpu(x)
    fused_calls.clear()
    x = x.double()
    torch.testing.assert_close(model.double()(x), original.double()(x))
    assert not fused_calls


def test_norms_alone_run_on_the_cpu(fused_calls: list[Any]) -> None:
    """In training, so that all of a model can be in channels_last."""
    original: Any = nn.Sequential(
        *(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.Conv2d(6, 4, 1)),
        *(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.InstanceNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 5, 3, stride=2), nn.InstanceNorm2d(5, affine=True), nn.Tanh()),
    )
    randomised(original)
    model: Any = accelerate(copy.deepcopy(original))[0]
    x = torch.randn(2, 4, 34, 33)
    for training in (True, False):
        assert_same(model.train(training), original.train(training), x)
        assert model[5].weight.is_contiguous(memory_format=torch.channels_last) == on_cpu(x)
    unusual = copy.deepcopy(original)
    unusual[1].momentum = None
    accelerate(unusual.train())
    # PyTorch normalises the batch, which it does more accurately in order
    assert all(parameter.is_contiguous() for parameter in unusual.parameters())


def test_batch_norm_that_nothing_calls() -> None:
    """It keeps no model from our kernels, unless its forward cannot be read."""
    forwards: dict[bool, Callable[[Any, Any], Any]] = {
        True: lambda m, x: m.block(x),
        False: lambda m, x: m.block(x if x.sum() > 0 else m.norm(x)),
    }
    for idle, function in forwards.items():
        model: Any = Forward(function)
        # by PyTorch alone
        model.norm.momentum = None
        model.block = nn.Sequential(*relu_conv(), nn.BatchNorm2d(4))
        _, report = accelerate(model.train())
        assert report.swapped == ("block.0",)
        weight = model.block[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (idle and on_cpu(weight))


def test_up_convolutions() -> None:
    torch.use_deterministic_algorithms(False)
    ups: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"bias": False}, ""),
        ({"kernel_size": 3}, "kernel_size (3, 3)"),
        ({"stride": 1}, "stride (1, 1)"),
        ({"padding": 1}, "padding (1, 1)"),
        ({"output_padding": 1}, "output_padding (1, 1)"),
        ({"dilation": 2}, "dilation (2, 2)"),
        ({"groups": 2}, "groups 2"),
    ]
    for options, reason in ups:
        given: dict[str, Any] = {"kernel_size": 2, "stride": 2, **options}
        original = nn.Sequential(*relu_conv(), nn.ConvTranspose2d(4, 4, **given))
        model, report = accelerate(copy.deepcopy(original))
        assert report.kept.get("2", "") == reason
        assert ("2" in report.swapped) == (not reason)
        assert_same(model, original, torch.randn(2, 4, 9, 7))


NOT_FUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "never called": (lambda m, x: m.relu(m.norm(x)), "no forward that could be read calls it"),
}


@pytest.mark.parametrize("name", [*UNREAD, *NOT_FUSED])
def test_leaves_alone(name: str, fused_calls: list[Any]) -> None:
    function, reason = {**UNREAD, **NOT_FUSED}[name]
    original = randomised(Forward(function)).eval()
    model, report = accelerate(copy.deepcopy(original))
    assert not report.swapped
    assert not report.on_cpu
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
    ]
    for conv, after, reason in layers:
        _, report = accelerate(nn.Sequential(conv, after, nn.ReLU()))
        assert reason in report.kept["0"]
    on_cpu_alone: list[tuple[nn.Module, str]] = [
        (nn.ReLU6(), "followed by ReLU6, not ReLU"),
        (nn.InstanceNorm2d(4), "followed by InstanceNorm2d, not ReLU"),
        (nn.BatchNorm2d(4, track_running_stats=False), "running statistics"),
        (nn.LeakyReLU(-0.1), "followed by LeakyReLU, not ReLU"),
    ]
    for after, reason in on_cpu_alone:
        _, report = accelerate(nn.Sequential(nn.Conv2d(4, 4, 3), after, nn.ReLU()))
        assert reason in report.on_cpu["0"]
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
        assert "hooks" in {**report.kept, **report.on_cpu}["0.0"]
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
