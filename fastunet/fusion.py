"""The modules in a graph that operators of ours can take, and what runs in their place.

What is looked for, each step the only use of the one before it:

    [cat of two ->] Conv2d 3x3 [-> normalisation] [-> ReLU or LeakyReLU] [-> 2x2 max-pooling]

with Dropout and Identity allowed in between, and other uses beside the max-pooling. With ReLU, and
BatchNorm2d or nothing before it, that is ``conv_relu``, on every device; for others the CPU alone
has kernels. Also 2x2 up-convolutions, and on the CPU any other normalisation and its activation.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .ops import norm_relu
from .swapped import (
    BETWEEN,
    NORMS,
    drops,
    is_pool,
    run,
    run_norm,
    run_up,
    slope_of,
    why_not,
    why_not_everywhere,
)
from .tracing import has_hooks

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_LEAKY_RELUS = (F.leaky_relu, F.leaky_relu_)
_CATS = (torch.cat, torch.concat, torch.concatenate)
_POOLS = (F.max_pool2d, torch.max_pool2d)


@dataclass(frozen=True)
class Outcome:
    """What came of one call of a convolution."""

    swapped: bool
    """On the CPU at least."""
    reason: str = ""
    """Why not, or why not on every device."""


def fuse(graph: fx.Graph, root: nn.Module) -> dict[nn.Module, list[Outcome]]:
    """Replace in ``graph`` what operators of ours can take; what came of each convolution call."""
    modules = dict(root.named_modules())
    outcomes: dict[nn.Module, list[Outcome]] = {}
    for node in list(graph.nodes):
        conv = _module(node, modules)
        if not isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
            continue
        reason = why_not(conv) or ("" if _takes_one(node) else "it is not called with one tensor")
        if reason:
            outcome = Outcome(False, reason)
        elif isinstance(conv, nn.Conv2d):
            outcome = Outcome(True, _fuse_conv(graph, node, modules))
        else:
            outcome = Outcome(True)
            with graph.inserting_before(node):
                up = graph.call_function(run_up, (*node.args, _part(graph, node)))
            _put(graph, up, [node])
        outcomes.setdefault(conv, []).append(outcome)
    for node in list(graph.nodes):
        norm = _module(node, modules)
        if isinstance(norm, NORMS) and not has_hooks(norm) and _takes_one(node):
            _fuse_norm(graph, node, modules)
    return outcomes


def called(graph: fx.Graph, root: nn.Module) -> set[nn.Module]:
    """The modules that ``graph`` calls whole."""
    modules = dict(root.named_modules())
    return {modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}


def _fuse_conv(graph: fx.Graph, conv: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Replace a convolution and what belongs to it; why that does not serve everywhere."""
    between, after, reason = _following(conv, modules)
    if after is None:
        # up to the normalisation, if there is one
        while between and not isinstance(_module(between[-1], modules), NORMS):
            between.pop()
    slope = 1.0 if after is None else _slope(after, modules)
    pool = _pool_of(after, modules) if after is not None and slope == 0 else None
    cat, skip, x = _inputs(conv, modules)
    with graph.inserting_before(conv):
        steps = tuple(_part(graph, step) for step in between)
        activation = _part(graph, after) or slope
        images = (x, skip, _part(graph, conv))
        call = graph.call_function(
            run, (*images, steps, activation, _part(graph, pool), pool is not None)
        )
        y = call
        if pool is not None:
            y = graph.call_function(operator.getitem, (call, 0))
            pool.replace_all_uses_with(graph.call_function(operator.getitem, (call, 1)))
            graph.erase_node(pool)
    _put(graph, y, [cat, conv, *between, after])
    return reason or why_not_everywhere([modules[str(step.target)] for step in between], slope)


def _following(
    conv: fx.Node, modules: dict[str, nn.Module]
) -> tuple[list[fx.Node], fx.Node | None, str]:
    """What stands between a convolution and its activation, and that, or why it has none."""
    between: list[fx.Node] = []
    last = conv
    while (after := _only_user(last)) is not None:
        module = _module(after, modules)
        if _slope(after, modules) is not None:
            return between, after, ""
        if module is not None and has_hooks(module):
            return between, None, f"its {type(module).__name__} has hooks"
        if type(module) not in BETWEEN or not _takes_one(after):
            return between, None, f"followed by {_describe(after, modules)}, not ReLU"
        if type(module) in NORMS and any(type(_module(b, modules)) in NORMS for b in between):
            return between, None, "followed by more than one normalisation"
        between.append(after)
        last = after
    name = type(_module(last, modules)).__name__
    return between, None, f"the output of its {name} is used more than once"


def _fuse_norm(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Replace a normalisation that no convolution of ours is before, and its activation."""
    after = _only_user(norm)
    slope = None if after is None else _slope(after, modules)
    after = None if slope is None else after
    with graph.inserting_before(norm):
        activation = _part(graph, after) or (1.0 if slope is None else slope)
        y = graph.call_function(run_norm, (*norm.args, _part(graph, norm), activation))
    _put(graph, y, [norm, after])


def _part(graph: fx.Graph, node: fx.Node | None) -> fx.Node | None:
    """The module that ``node`` calls, as an argument; None if it calls a function."""
    called = node is not None and node.op == "call_module"
    return graph.get_attr(str(node.target)) if node is not None and called else None


def _put(graph: fx.Graph, y: fx.Node, steps: list[fx.Node | None]) -> None:
    """Let ``y`` be what the last of ``steps`` gave, and take them out."""
    there = [step for step in steps if step is not None]
    there[-1].replace_all_uses_with(y)
    for step in reversed(there):
        graph.erase_node(step)


def trainable_norms(graph: fx.Graph, root: nn.Module) -> set[nn.Module]:
    """The normalisations that are part of what was replaced in ``graph``, in training too."""
    modules = dict(root.named_modules())
    found: set[nn.Module] = set()
    for node in graph.nodes:
        if node.target not in (run, run_norm):
            continue
        steps = node.args[3] if node.target is run else node.args[1:2]
        parts = [modules[str(step.target)] for step in steps]
        if not any(map(drops, parts)):
            found |= {part for part in parts if not norm_relu.why_not(part)}
    return found


def _module(node: fx.Node | None, modules: dict[str, nn.Module]) -> nn.Module | None:
    called = node is not None and node.op == "call_module"
    return modules.get(str(node.target)) if node is not None and called else None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    # an addition of a tensor to itself is one user that uses it twice
    if len(users) != 1 or _count(users[0], node) != 1:
        return None
    return users[0]


def _count(user: fx.Node, node: fx.Node) -> int:
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _slope(node: fx.Node, modules: dict[str, nn.Module]) -> float | None:
    """The slope below zero, if ``node`` calls ReLU or LeakyReLU."""
    if node.op == "call_module":
        return slope_of(_module(node, modules))
    if node.op == "call_method":
        return 0.0 if node.target in ("relu", "relu_") else None
    if node.target in _RELUS:
        return 0.0
    if node.target not in _LEAKY_RELUS:
        return None
    given: dict[str, Any] = {"negative_slope": 0.01, **node.kwargs}
    slope = node.args[1] if len(node.args) > 1 else given["negative_slope"]
    return float(slope) if isinstance(slope, (int, float)) and slope >= 0 else None


def _pool_of(relu: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The 2x2 max-pooling of the ReLU's output, unless something changes that in place."""
    pools = [user for user in relu.users if _is_pool(user, modules)]
    if not pools or any(_mutates(user, modules) for user in relu.users):
        return None
    return pools[0]


def _is_pool(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = _module(node, modules)
    if module is not None:
        return is_pool(module)
    if node.op != "call_function" or node.target not in _POOLS:
        return False
    given = dict(zip(("input", "kernel_size", "stride"), node.args, strict=False)) | node.kwargs
    sizes = [given.pop(name, 2) for name in ("kernel_size", "stride")]
    given.pop("input", None)
    plain = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    return (
        len(node.args) <= 3
        and all(size in (2, (2, 2), [2, 2], None) for size in sizes)
        and all(plain.get(name) == value for name, value in given.items())
    )


def _mutates(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = _module(node, modules)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.kwargs.get("inplace") or node.op == "call_method":
        return bool(node.kwargs.get("inplace")) or str(node.target).endswith("_")
    name = str(getattr(node.target, "__name__", ""))
    in_place = getattr(operator, name, None) is node.target and name.startswith("i")
    return (in_place and name not in ("is_", "is_not", "index", "inv", "invert")) or (
        name.endswith("_") and name != "is_"
    )


def _inputs(
    conv: fx.Node, modules: dict[str, nn.Module]
) -> tuple[fx.Node | None, fx.Node | None, Any]:
    """A concatenation of two that the convolution alone reads, and the two; or None twice and x."""
    cat = conv.args[0]
    apart = (None, None, cat)
    if not isinstance(cat, fx.Node) or cat.target not in _CATS or len(cat.users) != 1:
        return apart
    given: dict[str, Any] = {**dict(zip(("tensors", "dim"), cat.args, strict=False)), **cat.kwargs}
    tensors = given.get("tensors")
    if given.get("dim") not in (1, -3) or not isinstance(tensors, (list, tuple)):
        return apart
    between = cat.next
    while between is not conv:
        # the two are read later than they were
        if _mutates(between, modules):
            return apart
        between = between.next
    return (cat, *tensors) if len(tensors) == 2 else apart


def _describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    module = _module(node, modules)
    if module is not None:
        return type(module).__name__
    if node.op == "output":
        return "the output"
    return str(getattr(node.target, "__name__", node.target))
