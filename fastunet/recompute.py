"""Activation checkpointing: parts of a network, or tensors, computed again in backward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(model: nn.Module, part: Callable[..., Any], *arguments: Any) -> Any:
    """``part(*arguments)``, of which only the arguments are kept for backward.

    Args:
        model: the network that ``part`` belongs to; its batch normalisations see each batch once.
        part: a function or module; draws the same random numbers both times.
        arguments: its arguments.
    Returns: what ``part`` returns.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    # a compiled graph writes the statistics once, at its end
    if not norms or torch.compiler.is_compiling():
        return checkpoint(part, *arguments, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)

    return checkpoint(part, *arguments, use_reentrant=False, context_fn=contexts)


def others_keep() -> bool:
    """Whether somebody else decides what is kept, as a checkpoint around the network does."""
    internals: Any = torch._C
    return internals._autograd._top_saved_tensors_default_hooks(False) is not None


@contextmanager
def made_again(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Within, what is kept of ``tensor`` for backward is how it is made.

    Args:
        tensor: nobody changes what it is made of before backward.
        make: gives it once more, without gradients and under the autocast of now.
    """
    kind = tensor.device.type
    options: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
    }
    name = (tensor.data_ptr(), tensor.shape, tensor.stride())

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        return make if (kept.data_ptr(), kept.shape, kept.stride()) == name else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad(), torch.autocast(kind, cache_enabled=False, **options):
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def _statistics_kept(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """Batch normalisation in training that leaves its running statistics alone."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
