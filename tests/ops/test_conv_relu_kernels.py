"""The convolution's Triton kernels: on the GPU, or on the CPU in Triton's interpreter."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fastunet_benchmarks.figure import arrows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastunet.ops import eager
from fastunet.ops._library import is_plain

from ..accuracy import assert_as_accurate

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from fastunet.ops._triton import signature
from fastunet.ops.conv_relu import gpu, tiles, triton_gradients, triton_kernels
from fastunet.ops.conv_relu.tiles import Tile

# small enough that small images have several blocks, and large enough for the interpreter
TILES = {
    ("tma", "forward"): Tile("tma", 64, 8, 8, 64, 4, 2),
    ("tma", "data gradient"): Tile("tma", 64, 8, 8, 64, 4, 2),
    ("tma", "weight gradient"): Tile("tma", 64, 1, 16, 64, 4, 2),
    ("pointer", "forward"): Tile("pointer", 64, 1, 64, 64, 4, 2),
    ("pointer", "data gradient"): Tile("pointer", 64, 1, 64, 64, 4, 2),
    ("pointer", "weight gradient"): Tile("pointer", 64, 1, 64, 128, 4, 2),
}
KERNELS = ["tma", "pointer"]
LIBRARY = {name: getattr(gpu, name) for name in ("_library_forward", "convolution_gradients")}
# the interpreter's bfloat16 is wrong
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()

# (B, C_skip, C, C_out, H, W, padding, pool): each layer of figure 1 with an eighth of its channels
# and few pixels, odd ones among them
LAYERS = [
    (1, a.c_skip // 8, max(1, a.c_in // 8), a.c_out // 8, 7 + i % 5, 11 + i % 3, 0, a.pool)
    for i, a in enumerate(arrow for arrow in arrows(572) if arrow.kind == "conv")
]
CHANNELS = [
    (2, 0, c, 8 * (1 + c % 3), 5, 11, padding, padding == 1)
    for c in (1, 3, 8, 24, 64, 96)
    for padding in (0, 1)
] + [(2, 8, 16, 24, 9, 12, 1, True), (1, 3, 5, 7, 7, 9, 1, True), (1, 0, 8, 8, 3, 3, 0, False)]


def tile_of(kernel: str, problem: Any) -> Tile:
    """The kernel's; the interpreter pools each element by itself, those of no channel too."""
    tile = TILES[kernel, problem.kind]
    narrow = problem.pool and problem.c_out < 32 and not torch.cuda.is_available()
    return replace(tile, block_n=16) if narrow else tile


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes every convolution run by one of the kernels, or fail where it should."""

    def choose(problem: Any, *_: object) -> Tile:
        return tile_of(request.param, problem)

    def guarded(name: str) -> Callable[..., Any]:
        def library(*arguments: Any) -> Any:
            weight = next(a for a in arguments if isinstance(a, Tensor) and a.shape[2:] == (3, 3))
            unaligned = any(n * weight.itemsize % 16 for n in weight.shape[:2])
            assert request.param == "tma" and unaligned, "the library ran"  # noqa: PT018
            return LIBRARY[name](*arguments)

        return library

    monkeypatch.setattr(tiles, "choose", choose)
    monkeypatch.setattr(gpu, "CHOSEN", {})
    for name in LIBRARY:
        monkeypatch.setattr(gpu, name, guarded(name))
    monkeypatch.setattr(gpu, "_allows_tf32", lambda: True)
    return str(request.param)


def on_grid(t: Tensor, step: float) -> Tensor:
    """Multiples of ``step``, few enough that TF32 holds them, and sums of two, exactly."""
    return (t / step).round() * step


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    b, c_skip, c, c_out, h, w, padding, _ = shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}

    def images(*size: int) -> Tensor:
        images = on_grid(torch.randn(size, device=device), 2**-6).to(dtype)
        return images.contiguous(memory_format=torch.channels_last)

    scale = (2 / (9 * (c_skip + c))) ** 0.5
    return {
        "x": images(b, c, h, w),
        "weight": on_grid(images(c_out, c_skip + c, 3, 3).float() * scale, 2**-10).to(dtype),
        "bias": torch.randn(c_out, **options),
        "skip": images(b, c_skip, h + 5, w + 4) if c_skip else None,
        "padding": padding,
    }


def forward(arguments: dict[str, Any], pool: bool, module: ModuleType = gpu) -> tuple[Tensor, ...]:
    names = ("x", "weight", "bias", "padding", "skip")
    values = [arguments[name] for name in names]
    if pool:
        return module.conv_relu_pool_triton(*values)
    return (module.conv_relu_triton(*values),)


def gradients(
    arguments: dict[str, Any], incoming: list[Tensor], **flags: bool
) -> dict[str, Tensor]:
    y = forward(arguments, False)[0]
    names = ("x", "weight", "bias", "skip")
    grad_y, grad_pooled = incoming if len(incoming) == 2 else (incoming[0], None)
    grads = gpu.conv_relu_bwd_triton(
        grad_y, grad_pooled, y, arguments["x"], arguments["weight"], arguments["skip"],
        arguments["padding"], [True, True, True, arguments["skip"] is not None],
        flags.get("relu_made_x", False), flags.get("grad_is_masked", False),
    )  # fmt: skip
    return {n: g for n, g in zip(names, grads, strict=True) if arguments[n] is not None}


def eager_results(
    arguments: dict[str, Any], pool: bool, incoming: list[Tensor] | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and with ``incoming`` gradients, of eager PyTorch in ``dtype``."""
    leaves = {
        name: value.detach().to(dtype).requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    outputs = eager.conv_relu(**{**arguments, **leaves}, pool=pool)
    outputs = outputs if pool else (outputs,)
    if incoming is None:
        return outputs, {}
    grads = torch.autograd.grad(outputs, list(leaves.values()), [g.to(dtype) for g in incoming])
    return outputs, dict(zip(leaves, grads, strict=True))


def _has_clear_maximum(arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Where pooling's winner is no matter of rounding."""
    wide: dict[str, Any] = {
        n: v.double() if isinstance(v, Tensor) else v for n, v in arguments.items()
    }
    y = eager.conv_relu(**wide)
    blocks = y[:, :, : y.shape[2] // 2 * 2, : y.shape[3] // 2 * 2].unfold(2, 2, 2).unfold(3, 2, 2)
    first, second = blocks.flatten(4).topk(2).values.unbind(-1)
    return first - second > 8 * torch.finfo(dtype).eps * first


def check(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    pool = bool(shape[-1])
    arguments = inputs(shape, dtype, device)
    got = forward(arguments, pool)
    incoming = [on_grid(torch.randn_like(y), 2**-6) for y in got]
    if pool:
        incoming[1] *= _has_clear_maximum(arguments, dtype)
    exact, exact_grads = eager_results(arguments, pool, incoming, torch.float64)
    plain, plain_grads = eager_results(arguments, pool, incoming, dtype)
    for y, eager_y, exact_y in zip(got, plain, exact, strict=True):
        assert_as_accurate(y, eager_y, exact_y)
    grads = gradients(arguments, incoming)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert_as_accurate(grad, plain_grads[name], exact_grads[name])
        assert grad.stride() == torch.empty_like(arguments[name]).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LAYERS)
def test_layers_of_the_figure(
    shape: tuple[int, ...], dtype: torch.dtype, kernel: str, kernel_device: torch.device
) -> None:
    check(shape, dtype, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CHANNELS)
def test_channels(
    shape: tuple[int, ...], dtype: torch.dtype, kernel: str, kernel_device: torch.device
) -> None:
    check(shape, dtype, kernel_device)


def test_strides(kernel: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # descriptors leave most of these to the library
    for name, function in LIBRARY.items():
        monkeypatch.setattr(gpu, name, function)
    shape = (2, 8, 16, 24, 5, 10, 1, False)
    arguments = inputs(shape, torch.float32, kernel_device)
    arguments["x"] = arguments["x"][:1].expand(2, -1, -1, -1)
    want = eager.conv_relu(**arguments)
    x = arguments["x"]
    cut = torch.zeros(2, 16, 8, 12, device=x.device).to(memory_format=torch.channels_last)
    cut[:, :, 1:6, 2:12] = x
    layouts = {
        "expanded": {"x": x},
        "slice": {"x": cut[:, :, 1:6, 2:12]},
        "NCHW": {"x": x.contiguous()},
        "NCHW weights": {"weight": arguments["weight"].contiguous()},
        "transposed": {"skip": arguments["skip"].mT.contiguous().mT},
        "unaligned": {"x": torch.stack([x] * 3, 2)[:, :, 1]},
    }
    for name, layout in layouts.items():
        changed = arguments | layout
        torch.testing.assert_close(forward(changed, False)[0], want, msg=name)
        incoming = [torch.ones_like(want)]
        grads = gradients(changed, incoming)
        _, wanted = eager_results(changed, False, incoming, torch.float32)
        for leaf, grad in grads.items():
            torch.testing.assert_close(grad, wanted[leaf], msg=f"{name}: {leaf}")


def test_part_of_wider_weights(kernel: str, kernel_device: torch.device) -> None:
    """Right in the first call, and in the second, whose launch is as the first prepared it."""
    arguments = inputs((1, 0, 16, 24, 9, 12, 1, False), torch.float16, kernel_device)
    wide = torch.cat([arguments["weight"]] * 2, 1).contiguous(memory_format=torch.channels_last)
    want = forward(arguments, False)[0]
    for _ in range(2):
        assert torch.equal(forward(arguments | {"weight": wide[:, :16]}, False)[0], want)


def test_nan_stays(kernel: str, kernel_device: torch.device) -> None:
    arguments = inputs((1, 0, 8, 8, 8, 8, 0, True), torch.float32, kernel_device)
    arguments["x"][0, 3, 4, 4] = float("nan")
    for got, want in zip(
        forward(arguments, True), eager.conv_relu(**arguments, pool=True), strict=True
    ):
        assert torch.equal(got.isnan(), want.isnan())


def test_masks_between_two(kernel: str, kernel_device: torch.device) -> None:
    arguments = inputs((1, 8, 8, 16, 9, 11, 1, False), torch.float32, kernel_device)
    arguments["x"] = arguments["x"].relu()
    incoming = [torch.randn_like(forward(arguments, False)[0])]
    plain, masked = gradients(arguments, incoming), gradients(arguments, incoming, relu_made_x=True)
    assert torch.equal(masked["x"], plain["x"] * (arguments["x"] > 0))
    for name in ("weight", "bias", "skip"):
        assert torch.equal(masked[name], plain[name])
    y = forward(arguments, False)[0]
    again = gradients(arguments, [incoming[0] * (y > 0)], grad_is_masked=True)
    for name in ("x", "weight", "skip"):
        assert torch.equal(again[name], plain[name])
    torch.testing.assert_close(again["bias"], plain["bias"])


def test_library_where_no_tile(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    monkeypatch.setattr(tiles, "choose", lambda *_: None)
    monkeypatch.setattr(gpu, "CHOSEN", {})
    monkeypatch.setattr(gpu, "_allows_tf32", lambda: True)
    for shape in (LAYERS[1], (2, 8, 16, 24, 9, 12, 1, True)):
        check(shape, torch.float32, kernel_device)


def test_equal_bits(kernel: str, kernel_device: torch.device) -> None:
    arguments = inputs((2, 0, 16, 16, 20, 20, 0, False), torch.float32, kernel_device)
    incoming = [torch.randn_like(forward(arguments, False)[0])]
    first, second = (gradients(arguments, incoming) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("pool", [False, True])
def test_known_calls_need_no_dispatch(
    pool: bool, kernel: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs((1, 8, 16, 16, 12, 14, 0, pool), torch.float16, kernel_device)
    call: list[Any] = [arguments[name] for name in ("x", "weight", "bias", "padding", "skip")]
    prepared: Any = gpu.prepared
    if kernel_device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    assert prepared(*call, pool) is None
    signed = signature(*(arguments[name] for name in ("x", "weight", "bias", "skip")))
    gpu.CHOSEN["forward", 0, pool, signed] = TILES[kernel, "forward"]
    got = prepared(*call, pool)
    for ours, want in zip(got if pool else (got,), forward(arguments, pool), strict=True):
        assert torch.equal(ours, want)
    # another layout is another call
    call[0] = call[0].contiguous()
    assert prepared(*call, pool) is None


def test_plain_calls() -> None:
    x, weight = torch.zeros(1, 8, 8, 8), torch.nn.Parameter(torch.zeros(8, 8, 3, 3))
    assert not is_plain(x, weight)
    with torch.no_grad():
        assert is_plain(x, weight, None)
        assert not is_plain(FakeTensorMode().from_tensor(x))
        assert not torch.func.vmap(lambda x: torch.tensor(is_plain(x)))(x).any()
        with FakeTensorMode():
            assert not is_plain(x)
        with torch.autocast("cuda", torch.bfloat16, enabled=True):
            assert is_plain(x) != torch.is_autocast_enabled("cuda")
    with torch.inference_mode():
        assert is_plain(x, weight)


def test_unsupported() -> None:
    x, weight = (torch.zeros(1, 8, 8, 8).to(memory_format=torch.channels_last) for _ in range(2))
    assert gpu.unsupported(x, weight, None) is None
    assert gpu.unsupported(x.double(), weight, None) == (
        "torch.float64 is not float16, bfloat16 or float32"
    )
    assert gpu.unsupported(x[:0], weight, None) == "there are no pixels or channels"
    flat = x.contiguous()
    assert gpu.unsupported(flat, flat, None) == "the images are not in channels_last"


MUTANTS = {
    "taps": (triton_kernels, "tap // 3, column + tap % 3", "tap % 3, column + tap // 3"),
    "skip": (triton_kernels, "tap * C_ALL + first_in + k", "tap * C_ALL + k"),
    "bias": (triton_kernels, "mask=channel < C_OUT, other=0.0)", "mask=channel < 0, other=0.0)"),
    "ReLU": (triton_kernels, "if RELU:", "if False:"),
    "pool": (triton_kernels, "column // 2, n], pooled)", "column, n], pooled)"),
    "mask": (triton_gradients, "tl.where(y <= 0, 0.0, grad)", "grad"),
    "winner": (triton_gradients, "tl.where(is_largest, number, 4)", "number"),
    "split": (triton_gradients, "run = split * STEPS + step", "run = step"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_check_can_fail(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    module, right, wrong = MUTANTS[mutant]
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(right) >= 1, "the kernel has changed: change the mutant too"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("fastunet.ops.conv_relu.triton_mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    names = ("convolve", "data_gradient", "mask_gradient", "weight_gradient")
    for name in names:
        function: Callable[..., Any] | None = getattr(mutated, name, None)
        if function is not None:
            monkeypatch.setattr(gpu, name, function)
    monkeypatch.setattr(tiles, "choose", lambda problem, *_: tile_of("tma", problem))
    monkeypatch.setattr(gpu, "CHOSEN", {})
    monkeypatch.setattr(gpu, "_allows_tf32", lambda: True)
    with pytest.raises(AssertionError, match="is above"):
        check((1, 8, 16, 16, 12, 24, 0, True), torch.float32, kernel_device)
