"""Other people's U-Nets on our operators: ``accelerate`` patches a model where it stands."""

import copy
import copyreg
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from . import fusion, tracing
from .fusion import Outcome
from .ops.folding import by_statistics
from .swapped import on_cpu, why_not

# what a module's class is made to remember of the class that it was
_ORIGINAL = "_fastunet_original"
# what every module has: its mode and how it keeps hooks
_OF_MODULES = frozenset(vars(nn.Module()))
_CONVS = (nn.Conv2d, nn.ConvTranspose2d)
# without a forward of their own
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did with each Conv2d and ConvTranspose2d, by its name in the model."""

    swapped: tuple[str, ...]
    on_cpu: dict[str, str]
    """Those swapped on the CPU alone, and the reason why."""
    kept: dict[str, str]
    """The reason for each that was left alone."""
    notes: tuple[str, ...]
    """Modules whose forward could not be read; the modules in them were taken one by one."""

    def __str__(self) -> str:
        counts = [f"{len(self.swapped)} convolutions run on fastunet"]
        if self.on_cpu:
            counts.append(f"{len(self.on_cpu)} on the CPU alone")
        lines = [", ".join([*counts, f"{len(self.kept)} as before"])]
        lines += [f"  swapped  {name}" for name in self.swapped]
        lines += [f"  on CPU   {name}: {reason}" for name, reason in self.on_cpu.items()]
        lines += [f"  kept     {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])


def accelerate(model: nn.Module) -> tuple[nn.Module, Report]:
    """Run the convolutions of ``model`` on our operators, with what surrounds them.

    3x3 convolutions with ReLU behind them run on ``conv_relu``: a concatenation before, batch
    normalisation between the two (folded into the weights in eval mode) and a 2x2 max-pooling
    behind are taken along. 2x2 up-convolutions run on ``up_conv``. On the CPU so do 3x3
    convolutions with instance normalisation, LeakyReLU or anything else behind them, and all
    normalisation by the statistics of a batch or of an image. Everything else runs as before.
    Parameters, buffers, their names and the classes that ``isinstance`` sees stay. Weights and the
    images inside are in channels_last, the output is in the layout that it had. A copy by
    ``copy.deepcopy`` is accelerated too, a pickle is one of the original.

    The forward is read once by ``torch.fx``. Where that is not possible, or where it does something
    else in training, the modules in it are taken one by one. The original forward runs, all of it,
    where plain attributes of the modules have changed since, where hooks were added to modules in
    it, and for other arguments than its positional ones. So it does while batch normalisation is by
    the batch, unless images are on the CPU and our kernels do all of it: PyTorch's own is less
    accurate on channels_last images. ``train`` and ``eval`` lay out the weights accordingly.

    Args:
        model: any module; it is changed in place.
    Returns: ``model`` and the report, which says of each convolution whether it was swapped, or why
        not.
    Raises: TypeError if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        # once more: after a change of the model, for instance
        module.__class__ = getattr(type(module), _ORIGINAL, type(module))
    work = _Pass(model)
    work.accelerate(model)
    report = work.report()
    if report.swapped or report.on_cpu:
        _change_class(model, forward=_in_layout_of_inputs(type(model).forward))
        work.serves.all_norms = work.called_norms <= work.trainable
        work.serves.everywhere = bool(report.swapped)
        if not any(_is_channels_last(weight) for weight in model.parameters()):
            _change_class(model, train=_train(type(model).train, work.serves))
            _lay_out(model, work.serves)
    return model, report


@dataclass
class _Serves:
    """Where the graphs that were made of a model serve."""

    everywhere: bool = False
    """On every device; else on the CPU alone."""
    all_norms: bool = False
    """On the CPU also where batch normalisation is by the batch."""

    def these(self, norms: Iterable[nn.Module], images: Iterable[Any]) -> bool:
        """Whether ``images`` can run through graphs with ``norms`` as they are."""
        by_batch = any(by_statistics(norm) for norm in norms)  # type: ignore[arg-type]
        if on_cpu(*images):
            return self.all_norms or not by_batch
        return self.everywhere and not by_batch


class _Pass:
    """One walk through a model, and what it finds."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.outcomes: dict[nn.Module, list[Outcome]] = {}
        self.notes: list[str] = []
        self.seen: set[nn.Module] = set()
        self.called_norms: set[nn.Module] = set()
        self.trainable: set[nn.Module] = set()
        self.serves = _Serves()
        self.objection = ""
        if any(isinstance(module, nn.GroupNorm) for module in self.names):
            self.objection = "the model has GroupNorm, which is less accurate in channels_last"

    def accelerate(self, module: nn.Module) -> None:
        """Change the forward of ``module`` and those that it calls whole, or of what is in it."""
        if module in self.seen:
            return
        self.seen.add(module)
        if isinstance(module, _CONVS) or not _has_convs(module):
            self.called_norms.update(_batch_norms(module))
            return
        parts = {module}
        idle: set[nn.Module] = set()
        if not isinstance(module, _CONTAINERS):
            try:
                graph, parts = tracing.trace_both_modes(module)
            except tracing.UntraceableError as error:
                name = self.names[module] or "the model"
                self.notes.append(f"{name} ({type(module).__name__}) in its parts: {error}")
            else:
                idle = set(_whole(module, parts)) - fusion.called(graph, module)
                self._fuse(module, graph, parts)
        for part in _whole(module, parts):
            if part not in idle or _has_convs(part):
                self.accelerate(part)

    def _fuse(self, module: nn.Module, graph: fx.Graph, parts: set[nn.Module]) -> None:
        calls = fusion.fuse(graph, module)
        for conv, outcomes in calls.items():
            self.outcomes.setdefault(conv, []).extend(
                Outcome(False, self.objection) if outcome.swapped and self.objection else outcome
                for outcome in outcomes
            )
        if any(outcome.swapped for conv in calls for outcome in self.outcomes[conv]):
            self.trainable |= fusion.trainable_norms(graph, module)
            _change_class(module, forward=_read_forward(module, graph, parts, self.serves))

    def report(self) -> Report:
        """What came of all calls of each convolution."""
        everywhere: dict[str, nn.Module] = {}
        on_cpu: dict[str, str] = {}
        kept: dict[str, str] = {}
        for module, name in self.names.items():
            if not isinstance(module, _CONVS):
                continue
            uncalled = why_not(module) or "no forward that could be read calls it"
            outcomes = self.outcomes.get(module, [Outcome(False, uncalled)])
            why_kept = [outcome.reason for outcome in outcomes if not outcome.swapped]
            reasons = "; ".join(dict.fromkeys(why_kept or (o.reason for o in outcomes if o.reason)))
            if why_kept:
                kept[name] = reasons
            elif reasons:
                on_cpu[name] = reasons
            else:
                everywhere[name] = module
        if not any(isinstance(module, nn.Conv2d) for module in everywhere.values()):
            on_cpu |= dict.fromkeys(everywhere, "no 3x3 convolution is swapped everywhere")
            everywhere = {}
        return Report(tuple(everywhere), on_cpu, kept, tuple(self.notes))


def _has_convs(module: nn.Module) -> bool:
    return any(isinstance(each, _CONVS) for each in module.modules())


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]


def _whole(module: nn.Module, parts: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules in ``module`` outside of ``parts`` which no other such module contains."""
    for child in module.children():
        if child in parts or isinstance(child, _CONTAINERS):
            yield from _whole(child, parts)
        else:
            yield child


def _read_forward(
    module: nn.Module, graph: fx.Graph, inlined: set[nn.Module], serves: _Serves
) -> Callable[..., Any]:
    """What ``graph`` says, while ``inlined`` are as they were when it was read."""
    original = type(module).forward
    # by numbers, because looking up a deep module takes as long as a small layer
    paths: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = paths.setdefault(node.target, f"part{len(paths)}")
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<fastunet.accelerate {type(module).__name__}>", "exec"), namespace)
    read = namespace["forward"]
    states = [_State(path, part) for path, part in module.named_modules() if part in inlined]
    norms = [path for path, part in module.named_modules() if isinstance(part, _BatchNorm)]
    arguments = sum(node.op == "placeholder" for node in graph.nodes)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        as_read = not kwargs and len(args) == arguments and all(s.holds(self) for s in states)
        if not as_read or not serves.these((_part(self, path) for path in norms), args):
            return original(self, *args, **kwargs)
        parts = _Parts()
        for path, name in paths.items():
            setattr(parts, name, _at(self, path))
        return read(parts, *args)

    return forward


def _part(module: nn.Module, path: str) -> nn.Module:
    """The module at ``path``; the last that is there if something was taken out."""
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            break
        module = child
    return module


def _at(module: nn.Module, path: str) -> Any:
    """The module, parameter or attribute at ``path``."""
    part, name = module, path
    if "." in path:
        parent, name = path.rsplit(".", 1)
        part = _part(module, parent)
    child = part._modules.get(name)
    return getattr(part, name) if child is None else child


class _Parts:
    """Holds what a graph calls."""


class _State:
    """What the forward of a part of a model may depend on beside its tensors."""

    def __init__(self, path: str, part: nn.Module) -> None:
        self.path = path
        self.type = type(part)
        self.children = list(part._modules)
        self.attributes = [
            (name, value)
            for name, value in vars(part).items()
            if isinstance(value, (bool, int, float, str, type(None))) and name not in _OF_MODULES
        ]

    def holds(self, model: nn.Module) -> bool:
        """Whether the part of ``model`` still is in this state, and nothing listens to it."""
        part = _part(model, self.path)
        # the hooks and the type of the model itself are its caller's concern
        if part is not model and (type(part) is not self.type or tracing.has_hooks(part)):
            return False
        return list(part._modules) == self.children and all(
            getattr(part, name, None) == value for name, value in self.attributes
        )


def _in_layout_of_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, its images contiguous unless those that came in are in channels_last."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if any(_is_channels_last(given) for given in (*args, *kwargs.values())):
            return result
        return tree_map_only(Tensor, Tensor.contiguous, result)

    return forward


def _is_channels_last(given: Any) -> bool:
    return (
        isinstance(given, Tensor)
        and given.ndim == 4
        and given.is_contiguous(memory_format=torch.channels_last)
        and not given.is_contiguous()
    )


def _train(original: Callable[..., nn.Module], serves: _Serves) -> Callable[..., nn.Module]:
    """``original``, and the weights laid out for the new mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        original(self, mode)
        _lay_out(self, serves)
        return self

    return train


def _lay_out(model: nn.Module, serves: _Serves) -> None:
    """Put the weights into channels_last where our graphs serve, else in order."""
    ours = serves.these(_batch_norms(model), model.parameters())
    # parameters made in inference mode could not be trained any more
    with torch.inference_mode(False):
        layout = torch.channels_last if ours else torch.contiguous_format
        model.to(memory_format=layout)  # type: ignore[call-overload]


def _change_class(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Give ``module`` a class of its own, which differs from the one it had by ``methods``."""
    base = type(module)
    original = getattr(base, _ORIGINAL, base)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # by what the standard library has, so that loading it needs nothing of ours
        rebuild: Any = vars(copyreg)["_reconstructor"]
        return rebuild, (original, object, None), vars(self)

    module.__class__ = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__deepcopy__": deepcopy,
            "__reduce_ex__": reduce,
            _ORIGINAL: original,
            **{name: functools.wraps(getattr(base, name))(methods[name]) for name in methods},
        },
    )
