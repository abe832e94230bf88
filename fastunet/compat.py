"""State dicts of other people's U-Nets, told by their keys and rearranged for ``fastunet.UNet``.

A layout says which module of theirs is which of ours. What is left are three rearrangements:

    [up, skip] concatenations      the input channels of the convolutions behind them change places
    convolutions without a bias    get one of zeros
    numbers of batches             that old files lack start at zero
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .unet import UNet

Modules = dict[str, str]

# where checkpoints keep the weights, and what wrappers put before each key
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "unet.")
# of our keys, those that others may lack
OPTIONAL = re.compile(r"(contracting|expanding)\.\d+\.conv[12]\.(bias|norm\.num_batches_tracked)")


@dataclass(frozen=True)
class Layout:
    """How the keys of a kind of U-Net are named.

    Args:
        name: what messages call it.
        level: matches one key of each level of the contracting path, and no other.
        modules: their name of each of our modules, for the keys of a state dict and its levels.
        norm: where its batch normalisation is.
        no_up_weights: how it up-samples without weights, if it can.
        up_first: whether the up-sampled features come before the skip.
        options: arguments of ``UNet`` that weights do not tell.
    """

    name: str
    level: re.Pattern[str]
    modules: Callable[[Iterable[str], int], Modules]
    norm: str = "batch"
    no_up_weights: str | None = None
    up_first: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _pair(ours: str, names: Iterable[str]) -> Modules:
    """The modules of a pair: convolution, normalisation, convolution, normalisation."""
    parts = ("conv1", "conv1.norm", "conv2", "conv2.norm")
    return {f"{ours}.{part}": name for part, name in zip(parts, names, strict=True)}


def _ours(keys: Iterable[str], levels: int) -> Modules:
    modules = {"head": "head"}
    for level in range(levels):
        modules |= {name: name for name in _pair(f"contracting.{level}", [""] * 4)}
    for step in range(levels - 1):
        modules[f"up_convs.{step}"] = f"up_convs.{step}"
        modules |= {name: name for name in _pair(f"expanding.{step}", [""] * 4)}
    return modules


def _double_conv(keys: Iterable[str], levels: int) -> Modules:
    def pair(ours: str, theirs: str) -> Modules:
        return _pair(ours, (f"{theirs}.double_conv.{i}" for i in (0, 1, 3, 4)))

    modules = {"head": "outc.conv", **pair("contracting.0", "inc")}
    for level in range(1, levels):
        modules |= pair(f"contracting.{level}", f"down{level}.maxpool_conv.1")
    for step in range(levels - 1):
        modules[f"up_convs.{step}"] = f"up{step + 1}.up"
        modules |= pair(f"expanding.{step}", f"up{step + 1}.conv")
    return modules


def _down_path(keys: Iterable[str], levels: int) -> Modules:
    keys = set(keys)
    # convolution, ReLU and perhaps normalisation, twice
    numbers = (0, 2, 3, 5) if "down_path.0.block.3.weight" in keys else (0, -1, 2, -1)
    up = "up.1" if "up_path.0.up.1.weight" in keys else "up"

    def pair(ours: str, theirs: str) -> Modules:
        return _pair(ours, (f"{theirs}.{i}" for i in numbers))

    modules = {"head": "last"}
    for level in range(levels):
        modules |= pair(f"contracting.{level}", f"down_path.{level}.block")
    for step in range(levels - 1):
        modules[f"up_convs.{step}"] = f"up_path.{step}.{up}"
        modules |= pair(f"expanding.{step}", f"up_path.{step}.conv_block.block")
    return modules


def _named_blocks(keys: Iterable[str], levels: int) -> Modules:
    def pair(ours: str, theirs: str, short: str) -> Modules:
        parts = ("conv1", "norm1", "conv2", "norm2")
        return _pair(ours, (f"{theirs}.{short}{part}" for part in parts))

    modules = {"head": "conv"}
    for level in range(levels - 1):
        number = level + 1
        modules |= pair(f"contracting.{level}", f"encoder{number}", f"enc{number}")
    modules |= pair(f"contracting.{levels - 1}", "bottleneck", "bottleneck")
    for step in range(levels - 1):
        number = levels - 1 - step
        modules[f"up_convs.{step}"] = f"upconv{number}"
        modules |= pair(f"expanding.{step}", f"decoder{number}", f"dec{number}")
    return modules


LAYOUTS = (
    Layout(
        "fastunet.UNet",
        re.compile(r"contracting\.\d+\.conv1\.weight"),
        _ours,
        no_up_weights="aligned",
    ),
    Layout(
        "UNet(n_channels, n_classes, bilinear)",
        re.compile(r"(inc|down\d+\.maxpool_conv\.1)\.double_conv\.0\.weight"),
        _double_conv,
        no_up_weights="aligned",
        options={"padding": "same", "odd": "pad", "dropout": 0.0},
    ),
    Layout(
        "UNet(in_channels, n_classes, depth, wf, padding, batch_norm, up_mode)",
        re.compile(r"down_path\.\d+\.block\.0\.weight"),
        _down_path,
        norm="batch-after",
        up_first=True,
        options={"odd": "crop", "dropout": 0.0},
    ),
    Layout(
        "UNet(in_channels, out_channels, init_features)",
        re.compile(r"(encoder\d+\.enc\d+|bottleneck\.bottleneck)conv1\.weight"),
        _named_blocks,
        up_first=True,
        options={"padding": "same", "dropout": 0.0, "activation": "sigmoid"},
    ),
)


def recognise(
    state: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of ``UNet`` and its weights that a state dict means.

    Args:
        state: as ``UNet.from_state_dict`` takes it.
        options: arguments of ``UNet`` that go before those that were found.
    Returns: arguments and state dict of ``UNet``; the weights are those of ``state``, not copies,
        where nothing had to be rearranged.
    Raises: as ``UNet.from_state_dict``.
    """
    tensors = _tensors(state)
    layouts = [(layout, layout.modules(tensors, _levels(layout, tensors))) for layout in LAYOUTS]
    layout, modules = max(layouts, key=lambda entry: _found(tensors, entry[1]))
    if not _found(tensors, modules):
        raise ValueError(
            "UNet.from_state_dict: state must be of a known U-Net, got the keys "
            f"{_some(list(tensors))}; known: {', '.join(layout.name for layout in LAYOUTS)}"
        )
    config = {**_config(tensors, layout, modules), **options}
    with torch.device("meta"):
        wanted = UNet(**config).state_dict()
    theirs = {key: _their_key(key, modules) for key in wanted}
    optional = {theirs[key] for key in wanted if OPTIONAL.fullmatch(key)}
    _check_fit(tensors, layout, {theirs[key]: like for key, like in wanted.items()}, optional)
    weights = {
        key: tensors[theirs[key]]
        if theirs[key] in tensors
        else torch.zeros(like.shape, dtype=like.dtype)
        for key, like in wanted.items()
    }
    if layout.up_first:
        for step, width in enumerate(reversed(config["widths"][:-1])):
            key = f"expanding.{step}.conv1.weight"
            up, skip = weights[key].split([weights[key].shape[1] - width, width], 1)
            weights[key] = torch.cat([skip, up], 1)
    return config, weights


def _tensors(state: object) -> dict[str, Tensor]:
    """The tensors of a state dict, out of its wrappers and without common prefixes."""
    if not isinstance(state, Mapping):
        raise TypeError(
            "UNet.from_state_dict: state must be a mapping from keys to tensors, as "
            f"model.state_dict() returns it, got {type(state).__name__}"
        )
    # deep enough for every wrapper; a file may hold itself
    for _ in WRAPPERS:
        inner = (state.get(name) for name in WRAPPERS)
        state = next((value for value in inner if isinstance(value, Mapping)), state)
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"UNet.from_state_dict: state must hold tensors, got {_some(list(map(str, state)))}"
        )
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _levels(layout: Layout, tensors: Mapping[str, Tensor]) -> int:
    return max(1, sum(layout.level.fullmatch(key) is not None for key in tensors))


def _found(tensors: Mapping[str, Tensor], modules: Modules) -> int:
    """How many modules have weights."""
    return sum(f"{name}.weight" in tensors for name in modules.values())


def _their_key(key: str, modules: Modules) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{modules.get(module, module)}.{leaf}"


def _config(tensors: Mapping[str, Tensor], layout: Layout, modules: Modules) -> dict[str, Any]:
    """The arguments of ``UNet``, from the shapes of the weights."""
    levels = _levels(layout, tensors)
    down = [_weight(tensors, layout, modules[f"contracting.{i}.conv1"]) for i in range(levels)]
    head = _weight(tensors, layout, modules["head"])
    widths = [len(weight) for weight in down]
    ups = [modules[f"up_convs.{step}"] for step in range(levels - 1)]
    up, variant = "transpose", "paper"
    if any(f"{name}.weight" in tensors for name in ups):
        last = _weight(tensors, layout, ups[-1])
        if last.shape[2:] == (1, 1):
            up = "bilinear"
        # the last up-convolution of the released network has twice the outputs
        outputs = last.shape[0 if up == "bilinear" else 1]
        if layout.modules is _ours and outputs == widths[1] != widths[0]:
            variant = "release"
    elif ups and layout.no_up_weights:
        up = layout.no_up_weights
    normed = f"{modules['contracting.0.conv1.norm']}.weight" in tensors
    return {
        "in_channels": down[0].shape[1],
        "n_classes": len(head),
        "widths": widths,
        "norm": layout.norm if normed else None,
        "up": up,
        "variant": variant,
        **layout.options,
    }


def _weight(tensors: Mapping[str, Tensor], layout: Layout, name: str) -> Tensor:
    weight = tensors.get(f"{name}.weight")
    if weight is None:
        raise _misfit(layout, [f"{name}.weight is missing"])
    if weight.ndim != 4:
        raise _misfit(layout, [f"{name}.weight is {list(weight.shape)}, not 4-d"])
    return weight


def _check_fit(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    wanted: Mapping[str, Tensor],
    optional: set[str],
) -> None:
    """Every key that is wanted is there with its shape, and no other."""
    missing = wanted.keys() - tensors.keys()
    for leaf in (".bias", ".num_batches_tracked"):
        # all of them or none
        group = {key for key in optional if key.endswith(leaf)}
        if group <= missing:
            missing -= group
    wrong = [
        f"{key} is {list(tensors[key].shape)}, not {list(like.shape)}"
        for key, like in wanted.items()
        if key in tensors and tensors[key].shape != like.shape
    ] + [
        f"{key} is {tensors[key].dtype}, not floating point"
        for key, like in wanted.items()
        if key in tensors and like.is_floating_point() and not tensors[key].is_floating_point()
    ]
    complaints = [
        f"{what} {_some(sorted(keys))}"
        for what, keys in (("missing", missing), ("unknown", tensors.keys() - wanted.keys()))
        if keys
    ]
    if complaints or wrong:
        raise _misfit(layout, [*complaints, *([_some(wrong)] if wrong else [])])


def _misfit(layout: Layout, complaints: list[str]) -> ValueError:
    return ValueError(
        f"UNet.from_state_dict: state must fit a known U-Net; the closest, {layout.name}, "
        f"does not: {'; '.join(complaints)}"
    )


def _some(names: list[str], count: int = 4) -> str:
    """The first of ``names`` and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
