"""The network against the paper's figure, the released network and its eager twin."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastunet
from fastunet import UNet
from fastunet.layers import ANSWERS

from .accuracy import assert_as_accurate, root_sum_square

SMALL = (4, 8, 16)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"variant": "release"},
    {"padding": "same"},
    {"up": "bilinear"},
    {"norm": "batch"},
    {"padding": "same", "norm": "batch", "up": "bilinear", "variant": "release"},
    {"padding": "same", "norm": "batch-after"},
]


def small(**options: Any) -> UNet:
    torch.manual_seed(0)
    model = UNet(2, **{"n_classes": 3, **options}, widths=SMALL)
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.running_mean", "norm.bias")):
            tensor.normal_()
        elif name.endswith(("norm.running_var", "norm.weight")):
            tensor.uniform_(0.5, 2)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts() -> None:
    with torch.device("meta"):
        assert parameters(UNet()) == 31_030_658
        assert parameters(UNet(variant="release")) == 31_100_354


def test_figure_sizes() -> None:
    with torch.device("meta"):
        model = UNet()
        x = torch.empty(1, 1, 572, 572)
        sizes = []
        for pair in model.contracting:
            pair.register_forward_hook(
                lambda _, __, y: sizes.append(tuple((y[0] if isinstance(y, tuple) else y).shape))
            )
        assert model(x).shape == (1, 2, 388, 388)
    # the figure's left side: channels and size after each pair of convolutions
    assert [shape[1:3] for shape in sizes] == [
        (64, 568), (128, 280), (256, 136), (512, 64), (1024, 28)
    ]  # fmt: skip
    assert (model.output_size(572), model.margin, model.border) == (388, 92, 0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_forward_matches_eager(options: dict[str, Any], device: torch.device) -> None:
    model = small(**options).to(device).eval()
    twin = small(**options, ops=fastunet.ops.eager).to(device).eval()
    exact_twin = copy.deepcopy(twin).double()
    x = torch.randn(2, 2, 60, 52, device=device)
    with torch.no_grad():
        assert_as_accurate(model(x), twin(x), exact_twin(x.double()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_classes": 1},
        {"n_classes": 300},
        {"padding": "same", "norm": "batch"},
        {"padding": "same", "activation": "sigmoid"},
        {"n_classes": 1, "activation": "sigmoid"},
    ],
    ids=str,
)
def test_outputs(options: dict[str, Any], device: torch.device) -> None:
    model, twin = (
        small(**options, ops=ops).to(device).eval() for ops in (fastunet.ops, fastunet.ops.eager)
    )
    exact = copy.deepcopy(twin).double()
    # sizes that "same" crops
    x = torch.randn(2, 2, 61, 53, device=device)[:, :, : 61 if "padding" in options else 60, 1:]
    with torch.no_grad():
        logits, p, labels = (exact(x.double(), output) for output in ANSWERS)
        for network in (model, twin):
            assert torch.equal(network(x), network(x, output="logit"))
            assert_as_accurate(network(x, "probability"), twin(x, "probability"), p)
        ours = model(x, "label")
        lower = copy.deepcopy(model).bfloat16()(x.bfloat16(), "probability")
    assert lower.dtype == torch.float32
    want = logits if model.activation else logits.sigmoid()
    if model.n_classes > 1 and not model.activation:
        want = logits.softmax(1)
    torch.testing.assert_close(p, want)
    several = model.n_classes > 1
    assert torch.equal(labels, p.argmax(1) if several else p[:, 0] > 0.5)
    assert labels.dtype == (torch.int32 if model.n_classes > 256 else torch.uint8)
    assert ours.dtype == labels.dtype
    assert len(labels.unique()) > 1
    # where two are equal but for rounding, either will do
    best = p.topk(2, dim=1).values if several else torch.cat([p, 1 - p], 1)
    apart = (best[:, 0] - best[:, 1]).abs() > 1e-5
    assert torch.equal(ours[apart], labels[apart])
    assert apart.float().mean() > 0.9


def test_outputs_are_fused() -> None:
    calls = []

    def noted(name: str) -> Any:
        def operator(*arguments: Any) -> Any:
            calls.append(name)
            return getattr(fastunet.ops, name)(*arguments)

        return operator

    names = ("conv_softmax", "conv_argmax")
    ops = SimpleNamespace(**{**vars(fastunet.ops), **{name: noted(name) for name in names}})
    x = torch.randn(1, 2, 44, 44)
    for output in ANSWERS:
        small(ops=ops)(x, output)
    assert calls == list(names)
    for options in ({"n_classes": 1}, {"activation": "sigmoid"}):
        small(**options, ops=ops)(x, "label")
    assert calls == list(names)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_backward_matches_eager(options: dict[str, Any], device: torch.device) -> None:
    x = torch.randn(2, 2, 60, 52, device=device)
    grads = []
    for ops, dtype in (
        (fastunet.ops, torch.float32),
        (fastunet.ops.eager, torch.float32),
        (fastunet.ops.eager, torch.float64),
    ):
        model = small(**options, dropout=0.0, ops=ops).to(device, dtype)
        model(x.to(dtype)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for got, eager, exact in zip(*grads, strict=True):
        assert got is not None
        assert eager is not None
        assert exact is not None
        assert_as_accurate(got, eager, exact, root_sum_square)


def test_dropout_is_at_the_end_of_the_contracting_path() -> None:
    def rates(model: UNet) -> list[float]:
        return [pair.dropout.p for pair in [*model.contracting, *model.expanding]]

    assert rates(small()) == [0, 0, 0.5, 0, 0]
    assert rates(small(variant="release")) == [0, 0.5, 0.5, 0, 0]
    model = small().train()
    x = torch.randn(1, 2, 44, 44)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_he_initialisation() -> None:
    model = UNet(widths=(64, 128))
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            inputs = module.in_channels
        elif isinstance(module, nn.Conv2d):
            inputs = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        else:
            continue
        assert module.bias is not None
        assert not module.bias.any()
        if module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.03)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_valid_sizes(levels: int) -> None:
    def brute_force(size: int) -> int:
        for _ in range(levels - 1):
            size -= 4
            if size < 2 or size % 2:
                return 0
            size //= 2
        size -= 4
        for _ in range(levels - 1):
            size = 2 * size - 4 if size > 0 else 0
        return max(size, 0)

    with torch.device("meta"):
        model = UNet(widths=(2,) * levels)
    for size in range(1, 400):
        want = brute_force(size)
        if want:
            assert model.output_size(size) == want
            assert model.fitting_size(size) == size
        else:
            with pytest.raises(ValueError, match="the nearest that fit"):
                model.output_size(size)
            above = model.fitting_size(size)
            assert above == next(n for n in range(size, 1000) if brute_force(n))
    assert 2 * model.margin == above - brute_force(above)


def test_error_names_nearest_sizes() -> None:
    model = UNet(widths=(2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"got 570 pixels; the nearest that fit: 556 and 572$"):
        model(torch.zeros(1, 1, 572, 570))
    with pytest.raises(ValueError, match=r"got 100 pixels; the nearest that fit: 188$"):
        model(torch.zeros(1, 1, 100, 188))
    with pytest.raises(ValueError, match=r"x must be \[B, 1, H, W\], got \[1, 3, 188, 188\]"):
        model(torch.zeros(1, 3, 188, 188))
    with pytest.raises(ValueError, match=r"output must be 'logit' or .* or 'label', got 'mask'"):
        model(torch.zeros(1, 1, 188, 188), "mask")


@pytest.mark.parametrize("up", ["transpose", "bilinear"])
def test_same_takes_any_size(up: Any) -> None:
    model = small(padding="same", up=up).eval()
    for height in range(4, 14):
        assert model(torch.zeros(1, 2, height, 9)).shape == (1, 3, height, 9)
    with pytest.raises(ValueError, match="x must be at least 4 pixels, got 3"):
        model(torch.zeros(1, 2, 3, 9))


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up", ["transpose", "bilinear"])
def test_margin_is_what_a_window_lacks(padding: Any, up: Any) -> None:
    model = small(padding=padding, up=up).double().eval()
    size, edge = model.fitting_size(120), 16 * model.grid
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    elsewhere = x.clone()
    elsewhere[..., :edge] = torch.randn(1, 2, size, edge)
    with torch.no_grad():
        y = model(x)
        changed = (model(elsewhere) != y).flatten(0, 2).any(0).nonzero().max().item()
    first_right = changed + 1 + (size - y.shape[-1]) // 2
    # a window that starts at the edge does not know the pixels before it
    assert first_right - edge == model.margin + model.border


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_config_builds_the_same_network(options: dict[str, Any]) -> None:
    model = small(**options)
    again = UNet(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config


def test_copies_and_pickles() -> None:
    model = small().eval()
    x = torch.randn(1, 2, 44, 44)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))


def test_runs_channels_last() -> None:
    assert small()(torch.randn(1, 2, 44, 44)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, {"padding": "same"}], ids=str)
@pytest.mark.parametrize("output", ANSWERS)
def test_compile(options: dict[str, Any], output: Any) -> None:
    # graphs of other tests would use up their number
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    model = small(**options).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (44, 60, 76):
        x = torch.randn(1, 2, size, size + 4)
        torch.testing.assert_close(compiled(x, output), model(x, output))


def test_rejects() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"padding": "full"}, "UNet: padding must be 'valid' or 'same', got 'full'"),
        ({"norm": "layer"}, "norm must be None or 'batch'"),
        ({"up": "nearest"}, "up must be 'transpose' or 'bilinear'"),
        ({"variant": "keras"}, "variant must be 'paper' or 'release'"),
        ({"widths": ()}, "widths must be positive integers"),
        ({"widths": (8, 0)}, "widths must be positive integers"),
        ({"n_classes": 0}, "n_classes must be positive integers"),
        ({"in_channels": 1.5}, "in_channels must be positive integers"),
        ({"dropout": 1.0}, "dropout must be within 0 <= dropout < 1"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            UNet(**options)
