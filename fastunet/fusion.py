"""The convolutions in a graph that ``conv_relu`` can take, and what runs in their place.

What is looked for, each step the only use of the one before it:

    [cat of two ->] Conv2d 3x3 [-> BatchNorm2d] -> ReLU [-> 2x2 max-pooling, beside other uses]

with Dropout and Identity allowed before the ReLU. In eval mode dropout does nothing, and batch
normalisation is folded into the weights; in training it goes together with the ReLU
(``ops/folding.py``).
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .backends import EXTENSION_MISSING
from .ops import conv_norm_relu, conv_relu
from .ops.folding import padding_of
from .tracing import has_hooks

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
# what may stand between a convolution and its ReLU
_BETWEEN = (nn.BatchNorm2d, nn.Dropout, nn.Dropout2d, nn.Identity)
_CATS = (torch.cat, torch.concat, torch.concatenate)
_POOLS = (F.max_pool2d, torch.max_pool2d)


def why_not(module: nn.Module) -> str | None:
    """Why ``conv_relu`` cannot stand in for a convolution, whatever follows it, or None."""
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__name__} is not a plain Conv2d"
    for name, want in (("kernel_size", (3, 3)), ("stride", (1, 1)), ("dilation", (1, 1))):
        if getattr(module, name) != want:
            return f"{name} {getattr(module, name)}"
    if module.groups != 1:
        return f"groups {module.groups}"
    if module.padding not in ((0, 0), (1, 1), "same", "valid"):
        return f"padding {module.padding}"
    if module.padding_mode != "zeros" and module.padding not in ((0, 0), "valid"):
        return f"padding mode {module.padding_mode}"
    if has_hooks(module):
        return "it has hooks"
    return None


def why_not_between(module: nn.Module | None) -> str | None:
    """Why a module between convolution and ReLU is in the way even in eval mode, or None."""
    if module is None or type(module) not in _BETWEEN:
        return f"followed by {type(module).__name__}, not ReLU"
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
        return "its BatchNorm2d has no running statistics"
    return f"its {type(module).__name__} has hooks" if has_hooks(module) else None


def fuse(graph: fx.Graph, root: nn.Module) -> dict[nn.Module, list[str | None]]:
    """Replace in ``graph`` what ``conv_relu`` can take; for each convolution call, why not."""
    modules = dict(root.named_modules())
    outcomes: dict[nn.Module, list[str | None]] = {}
    for node in list(graph.nodes):
        conv = _module(node, modules)
        if isinstance(conv, nn.Conv2d):
            reason = why_not(conv) or _fuse_call(graph, node, modules)
            outcomes.setdefault(conv, []).append(reason)
    return outcomes


def _fuse_call(graph: fx.Graph, conv: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Replace one convolution and what belongs to it, or say why not."""
    if len(conv.args) != 1 or conv.kwargs:
        return "it is not called with one tensor"
    between: list[fx.Node] = []
    after = _only_user(conv)
    while after is not None and isinstance(_module(after, modules), _BETWEEN):
        reason = why_not_between(_module(after, modules))
        if reason:
            return reason
        between.append(after)
        after = _only_user(after)
    kinds = [type(_module(step, modules)) for step in (conv, *between)]
    if kinds.count(nn.BatchNorm2d) > 1:
        return "followed by more than one BatchNorm2d"
    if after is None:
        return f"the output of its {kinds[-1].__name__} is used more than once"
    relu = _module(after, modules)
    if not (_is_relu(after) or type(relu) is nn.ReLU):
        return f"followed by {_describe(after, modules)}, not ReLU"
    if relu is not None and has_hooks(relu):
        return "its ReLU has hooks"
    pool = _pool_of(after, modules)

    cat, skip, x = _inputs(conv, modules)
    with graph.inserting_before(conv):
        steps = [
            None if step is None or step.op != "call_module" else graph.get_attr(str(step.target))
            for step in (conv, after, pool, *between)
        ]
        y = call = graph.call_function(
            run, (x, skip, *steps[:3], tuple(steps[3:]), pool is not None)
        )
        if pool is not None:
            y = graph.call_function(operator.getitem, (call, 0))
            pool.replace_all_uses_with(graph.call_function(operator.getitem, (call, 1)))
            graph.erase_node(pool)
    after.replace_all_uses_with(y)
    for step in (after, *reversed(between), conv, cat):
        if step is not None:
            graph.erase_node(step)
    return None


def run(
    x: Tensor,
    skip: Tensor | None,
    conv: nn.Conv2d,
    relu: nn.ReLU | None,
    pool: nn.MaxPool2d | None,
    between: tuple[nn.Module, ...],
    pooled: bool,
) -> Any:
    """What the modules compute one after the other, by ``conv_relu`` where it can.

    Args:
        x: [B, C, H, W], input of ``conv``, or the second part of it.
        skip: [B, C_skip, H, W], the first part, or None.
        conv: the convolution.
        relu: the module of the ReLU, or None for a function.
        pool: the module of the max-pooling, or None for a function or none.
        between: what stands between ``conv`` and ReLU.
        pooled: whether there is a max-pooling.
    Returns: [B, C_out, H', W'], or with ``pooled`` a pair of that and its pooled copy.
    """
    if _takes(x, skip, conv, relu, pool, between):
        x = x.contiguous(memory_format=torch.channels_last)
        for module in between:
            if isinstance(module, nn.BatchNorm2d):
                return conv_norm_relu(x, conv, module, skip=skip, pool=pooled)
        padding = padding_of(conv)
        return conv_relu(x, conv.weight, conv.bias, padding=padding, skip=skip, pool=pooled)
    y = conv(x if skip is None else torch.cat([skip, x], 1))
    for module in between:
        y = module(y)
    y = F.relu(y) if relu is None else relu(y)
    if not pooled:
        return y
    return y, (F.max_pool2d(y, 2) if pool is None else pool(y))


def _takes(
    x: Tensor,
    skip: Tensor | None,
    conv: nn.Conv2d,
    relu: nn.ReLU | None,
    pool: nn.MaxPool2d | None,
    between: tuple[nn.Module, ...],
) -> bool:
    """Whether ``conv_relu`` serves this call, the modules as they are now."""
    if x.ndim != 4 or (skip is not None and skip.shape[2:] != x.shape[2:]):
        return False
    if why_not(conv) or (relu is not None and (type(relu) is not nn.ReLU or has_hooks(relu))):
        return False
    if pool is not None and not _is_pool_module(pool):
        return False
    for module in between:
        if why_not_between(module) or (module.training and _drops(module)):
            return False
    return True


def _drops(module: nn.Module) -> bool:
    return isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.p > 0


def trainable_norms(graph: fx.Graph, root: nn.Module) -> set[nn.Module]:
    """The batch normalisations that are part of what was replaced in ``graph``, in training too."""
    modules = dict(root.named_modules())
    found: set[nn.Module] = set()
    for node in graph.nodes:
        if node.op == "call_function" and node.target is run:
            between = [modules[str(step.target)] for step in node.args[5]]
            if not any(map(_drops, between)):
                found |= {module for module in between if isinstance(module, nn.BatchNorm2d)}
    return found


def trains(*images: Any) -> bool:
    """Whether batch normalisation of ``images`` in training has kernels of ours."""
    return not EXTENSION_MISSING and all(
        image.device.type == "cpu" and image.dtype in (torch.float32, torch.bfloat16)
        for image in images
        if isinstance(image, Tensor)
    )


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


def _is_relu(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _RELUS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _pool_of(relu: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The 2x2 max-pooling of the ReLU's output, unless something changes that in place."""
    pools = [user for user in relu.users if _is_pool(user, modules)]
    if not pools or any(_mutates(user, modules) for user in relu.users):
        return None
    return pools[0]


def _is_pool(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = _module(node, modules)
    if module is not None:
        return _is_pool_module(module)
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


def _is_pool_module(module: nn.Module) -> bool:
    return (
        type(module) is nn.MaxPool2d
        and module.kernel_size in (2, (2, 2))
        and module.stride in (2, (2, 2))
        and module.padding in (0, (0, 0))
        and module.dilation in (1, (1, 1))
        and not module.ceil_mode
        and not module.return_indices
        and not has_hooks(module)
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
