"""A module's ``forward`` read by ``torch.fx``, where what is read can stand in for it."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn


class UntraceableError(Exception):
    """Why the forward of a module cannot be replaced by what ``torch.fx`` reads of it."""


def has_hooks(module: nn.Module) -> bool:
    """Whether something else listens to the calls of ``module``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _Value(fx.Proxy):
    """A traced value that does not answer for its type, which ``isinstance`` would get wrong."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(("torch.fx", "torch.nn.parameter", "torch.nn.modules.module")):
            return _Value
        raise UntraceableError("it asks a value for its type")


class Tracer(fx.Tracer):
    """Reads the forward of a module and of those in it, except those of ``leaves``."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves
        self.inlined: set[nn.Module] = set()
        self.calls: list[nn.Module] = []
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Also modules with hooks, which their calls must run."""
        known = super().is_leaf_module(m, module_qualified_name)
        return known or m in self.leaves or has_hooks(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Remember where tracing is, for the reason if it fails."""
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        self.inlined.add(m)
        self.calls.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.calls.pop()
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What the forward computes with."""
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse what a graph does not record."""
        if _modes() != self.modes:
            raise UntraceableError("it switches gradients or autocast")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def trace(module: nn.Module) -> tuple[fx.Graph, set[nn.Module]]:
    """The graph of ``module`` and the modules whose forward it went through.

    Modules that cannot be read are called whole.

    Raises: UntraceableError with the reason why ``module`` itself cannot be read.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if any(
        p.kind != p.POSITIONAL_OR_KEYWORD or p.default is not inspect.Parameter.empty
        for p in parameters
    ):
        raise UntraceableError("it takes optional arguments")
    leaves: set[nn.Module] = set()
    while True:
        tracer = Tracer(leaves)
        try:
            with _without_side_effects(module):
                graph = tracer.trace(module)
        except Exception as error:
            if not tracer.calls:
                reason = str(error) or type(error).__name__
                raise UntraceableError(reason.splitlines()[0]) from error
            leaves.add(tracer.calls[-1])
        else:
            return graph, {module, *tracer.inlined}


def trace_both_modes(module: nn.Module) -> tuple[fx.Graph, set[nn.Module]]:
    """As ``trace``, of a forward that reads the same in training as out of it."""
    modes = {each: each.training for each in module.modules()}
    try:
        for each in modes:
            each.training = True
        in_training = trace(module)[0]
        for each in modes:
            each.training = False
        traced = trace(module)
    finally:
        for each, training in modes.items():
            each.training = training
    if str(in_training) != str(traced[0]):
        raise UntraceableError("it does something else in training")
    return traced


@contextmanager
def _without_side_effects(module: nn.Module) -> Iterator[None]:
    """Refuse a forward that leaves something in the module, which a graph would not."""
    before = {each: dict(vars(each)) for each in module.modules()}
    try:
        yield
    finally:
        changed = False
        for each, attributes in before.items():
            now = vars(each)
            if now.keys() != attributes.keys() or any(
                now[name] is not value for name, value in attributes.items()
            ):
                now.clear()
                now.update(attributes)
                changed = True
    if changed:
        raise UntraceableError("it sets attributes or makes tensors of its own")
