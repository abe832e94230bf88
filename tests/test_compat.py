"""State dicts of other people's U-Nets, against those networks in plain PyTorch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastunet import UNet, load_model, predict
from fastunet.checkpoint import save_checkpoint
from fastunet.compat import recognise
from fastunet.train import fit

from .accuracy import assert_as_accurate, max_abs
from .networks import ClassicUNet, HubUNet, PathUNet
from .sections import section, small_config

# each network, what its weights do not tell, and a size that does not halve evenly if it takes one
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[int, int]]] = {
    "padding": (lambda: ClassicUNet(2, 3, width=4), {}, (37, 50)),
    "padding-bilinear": (lambda: ClassicUNet(2, 3, bilinear=True, width=4), {}, (45, 33)),
    "cropping": (lambda: PathUNet(2, 3, depth=3, wf=2), {}, (47, 61)),
    "cropping-norm": (lambda: PathUNet(2, 3, 4, 2, batch_norm=True), {}, (97, 92)),
    "cropping-up": (lambda: PathUNet(2, 3, 3, 2, up_mode="upsample"), {}, (45, 60)),
    "cropping-same": (
        lambda: PathUNet(2, 3, 3, 2, padding=True, batch_norm=True, up_mode="upsample"),
        {"padding": "same"},
        (29, 50),
    ),
    "named": (lambda: HubUNet(2, 3, 4), {}, (32, 48)),
}
each_case = pytest.mark.parametrize("case", CASES)


def theirs(case: str) -> nn.Module:
    """The network, with batch normalisations that have seen something."""
    torch.manual_seed(0)
    net = CASES[case][0]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
    return net


def converted(case: str) -> tuple[UNet, nn.Module, nn.Module]:
    """Ours, theirs in the memory layout of ours, and theirs in float64."""
    net = theirs(case)
    ours = UNet.from_state_dict(net.state_dict(), **CASES[case][1])
    exact = copy.deepcopy(net).double()
    return ours, channels_last(net), exact


def channels_last(net: nn.Module) -> nn.Module:
    """In the layout of ours, where PyTorch's batch statistics are less exact."""
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def test_entries_and_widths_of_the_defaults() -> None:
    with torch.device("meta"):
        nets = [ClassicUNet(1, 2), ClassicUNet(3, 2, bilinear=True), PathUNet(), HubUNet()]
    assert [len(net.state_dict()) for net in nets] == [118, 110, 46, 118]
    configs = [recognise(net.state_dict(), {})[0] for net in nets]
    assert [config["widths"] for config in configs] == [
        [64, 128, 256, 512, 1024],
        [64, 128, 256, 512, 512],
        [64, 128, 256, 512, 1024],
        [32, 64, 128, 256, 512],
    ]
    assert [config["in_channels"] for config in configs] == [1, 3, 1, 3]
    assert [config["n_classes"] for config in configs] == [2, 2, 2, 1]


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward(case: str, training: bool) -> None:
    nets = converted(case)
    x = torch.randn(2, 2, *CASES[case][2])
    with torch.no_grad():
        ours, eager, exact = (
            net.train(training)(x.to(dtype))
            for net, dtype in zip(nets, (x.dtype, x.dtype, torch.float64), strict=True)
        )
    assert_as_accurate(ours, eager, exact)


@each_case
def test_backward_and_statistics(case: str) -> None:
    x = torch.randn(2, 2, *CASES[case][2])

    def trained(net: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """The gradient of each parameter, and the buffers."""
        net.train()(x.to(dtype)).square().mean().backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        return {**net.state_dict(), **grads}

    ours, net, exact_net = converted(case)
    got = trained(ours, torch.float32)
    _, eager = recognise(trained(net, torch.float32), CASES[case][1])
    _, exact = recognise(trained(exact_net, torch.float64), CASES[case][1])
    units = {name: max_abs(value) for name, value in exact.items() if value.dtype == torch.float64}
    # each in units of its largest: where sums have another order, one tensor of few may be unlucky
    actual, of_eager, of_exact = (
        torch.cat([tensors[name].flatten() / unit for name, unit in units.items()])
        for tensors in (got, eager, exact)
    )
    assert_as_accurate(actual, of_eager, of_exact)
    for name in got.keys() - units.keys():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(got[name], eager[name])
        else:
            # theirs has no such bias: batch normalisation takes it away again
            assert name.endswith(("conv1.bias", "conv2.bias"))
            assert not ours.state_dict()[name].any()


@each_case
def test_what_surrounds_the_weights(case: str) -> None:
    state = theirs(case).state_dict()
    options = CASES[case][1]
    plain = UNet.from_state_dict(state, **options).state_dict()
    prefixed = {f"module.{key}": value for key, value in state.items()}
    for wrapped in (
        {**state, "mask_values": [0, 255]},
        prefixed,
        {"epoch": 3, "loss": torch.tensor(0.1), "state_dict": state},
        {"model": prefixed, "optimizer": {"state": {}, "param_groups": []}},
        {"state_dict": {f"model.module.{key}": value for key, value in state.items()}},
        {f"_orig_mod.{key}": value for key, value in state.items()},
    ):
        again = UNet.from_state_dict(wrapped, **options).state_dict()
        assert again.keys() == plain.keys()
        assert all(torch.equal(again[key], value) for key, value in plain.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "release"},
        {"up": "bilinear", "variant": "release"},
        {"norm": "batch", "padding": "same", "up": "aligned"},
        {"padding": "same", "odd": "crop", "activation": "sigmoid", "dropout": 0.1},
    ],
    ids=str,
)
def test_own_state_dicts(options: dict[str, Any]) -> None:
    model = UNet(2, 3, widths=(4, 8, 16), **options)
    untold = {k: v for k, v in options.items() if k not in ("norm", "up", "variant")}
    again = UNet.from_state_dict(nn.DataParallel(model).state_dict(), **untold)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_biases_and_counts_that_old_files_have_or_lack() -> None:
    net = theirs("padding")
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.randn(module.out_channels))
    state = net.state_dict()
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]
    ours = UNet.from_state_dict(state).eval()
    x = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        eager = channels_last(net).eval()(x)
        exact = copy.deepcopy(net).double()(x.double())
        assert_as_accurate(ours(x), eager, exact)


def test_half_precision_weights_become_float32() -> None:
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in theirs("named").state_dict().items()
    }
    model = UNet.from_state_dict(state)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, state["conv.weight"].float())


def damaged(state: dict[str, Any], case: str) -> dict[str, Any]:
    if case == "a missing key":
        del state["down2.maxpool_conv.1.double_conv.3.weight"]
    elif case == "a missing level":
        state = {key: value for key, value in state.items() if not key.startswith("down2.")}
    elif case == "another shape":
        state["up4.conv.double_conv.0.weight"] = torch.zeros(4, 4, 3, 3)
    elif case == "a vector":
        state["outc.conv.weight"] = torch.zeros(4)
    elif case == "another key":
        state["attention.weight"] = torch.zeros(4)
    elif case == "integers":
        state["outc.conv.bias"] = torch.zeros(3, dtype=torch.int8)
    elif case == "some biases":
        state["inc.double_conv.0.bias"] = torch.zeros(4)
    return state


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a missing key", r"missing down2\.maxpool_conv\.1\.double_conv\.3\.weight$"),
        ("a missing level", r"down2\.maxpool_conv\.1\.double_conv\.0\.weight is missing$"),
        ("another shape", r"0\.weight is \[4, 4, 3, 3\], not \[4, 8, 3, 3\]$"),
        ("a vector", r"outc\.conv\.weight is \[4\], not 4-d$"),
        ("another key", r"unknown attention\.weight$"),
        ("integers", r"outc\.conv\.bias is torch\.int8, not floating point$"),
        ("some biases", r"missing .*double_conv\.[03]\.bias.* and 13 more$"),
    ],
)
def test_names_what_does_not_fit(case: str, message: str) -> None:
    state = damaged(dict(theirs("padding").state_dict()), case)
    closest = r"the closest, UNet\(n_channels, n_classes, bilinear\), does not: "
    with pytest.raises(ValueError, match=closest + ".*" + message):
        UNet.from_state_dict(state)


def test_rejects() -> None:
    with pytest.raises(TypeError, match=r"state must be a mapping from keys to tensors.*got UNet"):
        UNet.from_state_dict(UNet(widths=(2, 2)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state must hold tensors, got epoch, state_dict"):
        UNet.from_state_dict({"epoch": 1, "state_dict": None})
    with pytest.raises(ValueError, match=r"got the keys layer1\.weight, layer1\.bias; known"):
        UNet.from_state_dict({"layer1.weight": torch.zeros(1), "layer1.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing contracting\.3\.conv1\.bias"):
        UNet.from_state_dict(theirs("cropping").state_dict(), widths=(4, 8, 16, 32))
    itself: dict[str, Any] = {}
    itself["model"] = itself
    with pytest.raises(ValueError, match=r"state must hold tensors, got model$"):
        UNet.from_state_dict(itself)
    with pytest.raises(ValueError, match="padding must be 'valid' or 'same', got 'full'"):
        UNet.from_state_dict(theirs("cropping").state_dict(), padding="full")


@each_case
def test_checkpoint_gives_back_the_network(case: str, tmp_path: Path) -> None:
    model, _, _ = converted(case)
    save_checkpoint(tmp_path / "a.safetensors", model)
    again = load_model(tmp_path / "a.safetensors")
    x = torch.randn(1, 2, *CASES[case][2])
    with torch.no_grad():
        assert again.config == model.config
        assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("case", ["padding", "padding-bilinear", "cropping-same", "named"])
def test_predicts_what_the_original_does(case: str) -> None:
    ours, net, exact_net = converted(case)
    image = torch.randn(2, 48, 64)

    def probability(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = net.eval()(x[None])[0]
        return y if case == "named" else y.softmax(0)

    eager, exact = probability(net, image), probability(exact_net, image.double())
    assert_as_accurate(torch.from_numpy(predict(ours, image)), eager, exact)
    labels = predict(ours, image, output="label")
    assert (labels == eager.argmax(0).numpy()).mean() == 1


@pytest.mark.parametrize(
    ("case", "height"),
    [("padding", 287), ("cropping", 71), ("cropping-norm", 95), ("cropping-same", 75)],
)
def test_tiles_give_the_whole(case: str, height: int) -> None:
    model, _, _ = converted(case)
    image, shape = torch.randn(2, height, 131), (3, height, 131)
    smallest = 2 * model.margin + model.grid
    tile = model.fitting_size(smallest + -smallest % model.grid)
    assert model.padding == "valid" or tile < height
    tiled, whole = (predict(model, image, tile=n) for n in (tile, model.fitting_size(480)))
    exact = predict(model.double(), image, tile=model.fitting_size(480))
    assert tiled.shape == whole.shape == shape
    got, eager, reference = (torch.from_numpy(p) for p in (tiled, whole, exact))
    assert_as_accurate(got, eager, reference.double())


def test_aligned_corners_need_the_whole_image() -> None:
    model, _, _ = converted("padding-bilinear")
    image = torch.randn(2, 37, 50)
    with torch.no_grad():
        whole = model.eval()(image[None], output="probability")[0]
    assert np.array_equal(predict(model, image, tile=64), whole.numpy())
    assert predict(model, torch.randn(2, 3, 5)).shape == (3, 3, 5)
    with pytest.raises(ValueError, match=r"tile must cover the image, 37 pixels.*got 32"):
        predict(model, image, tile=32)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_one_class_is_foreground(activation: Any) -> None:
    model = UNet(1, 1, widths=(4, 8), padding="same", activation=activation)
    image = torch.randn(1, 20, 20)
    probability = predict(model, image)
    with torch.no_grad():
        y = model.eval()(image[None])[0]
    assert np.array_equal(probability, (y if activation else y.sigmoid()).numpy())
    assert np.array_equal(predict(model, image, output="label"), (probability[0] > 0.5))


def test_trains(tmp_path: Path) -> None:
    for net in (
        ClassicUNet(1, 2, bilinear=True, width=4),
        PathUNet(1, 2, 3, 2, batch_norm=True),
    ):
        folder = tmp_path / type(net).__name__
        model = UNet.from_state_dict(net.state_dict())
        outcome = fit(
            model, [section()], small_config(steps=3), folder, validation=[section(1)], quiet=True
        )
        assert outcome.step == 3
        assert load_model(folder / "last.safetensors").config == model.config


def test_what_cannot_be_trained_says_so(tmp_path: Path) -> None:
    hub = HubUNet(1, 2, 2).state_dict()
    logits: dict[str, Any] = {"padding": "same", "widths": (4, 8, 16)}
    for model, message in (
        (UNet.from_state_dict(hub), "got n_classes 2 and activation sigmoid"),
        (UNet(1, 1, **logits), "logits of at least 2 classes.*got n_classes 1$"),
        (UNet(1, 2, odd="crop", **logits), "tile must fit.*61 pixels; the next that fits: 64"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model, [section()], small_config(tile=61), tmp_path, quiet=True)
    model = UNet.from_state_dict(hub, activation=None)
    assert fit(model, [section()], small_config(steps=1), tmp_path, quiet=True).step == 1
