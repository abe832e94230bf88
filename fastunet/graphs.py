"""CUDA graphs: the kernels of a network recorded once and launched together.

Small images and small networks take a GPU less time than launching their kernels takes the host. A
recording is of one shape, and of the weights' places in memory, not of their values.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .devices import autocast
from .ops._library import recording

# before a recording: libraries choose their kernels, and Triton compiles ours
WARM_UP = 3
# calls of a shape, where nobody asked for a recording
PATIENCE = 2


def unsupported(device: torch.device) -> str | None:
    """What a recording takes instead of a network on ``device``, or None if it takes that."""
    return None if device.type == "cuda" else f"a network on a CUDA device, got {device}"


def unsupported_in_training(model: nn.Module, processes: int) -> str | None:
    """What a recording takes instead of training ``model``, or None if it takes that."""
    if processes > 1:
        return f"one process, got {processes}"
    if getattr(model, "recompute", False):
        return "a network without recompute, which looks random states up"
    return unsupported(next(model.parameters()).device)


class Recorded:
    """A network in evaluation, recorded anew for each shape that it is given.

    Args:
        network: takes images and gives a tensor, without gradients; its weights stay where they
            are.
        patience: calls of a shape that run as they are before one is recorded, which takes as
            long as some more.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], patience: int = 0) -> None:
        self._network, self._patience = network, patience
        self._calls: Counter[object] = Counter()
        self._recordings: dict[object, tuple[Callable[[], None], Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """What the network gives for ``x`` [B, C, H, W]; the next call overwrites the result."""
        key = (x.shape, x.dtype)
        self._calls[key] += 1
        if self._calls[key] <= self._patience:
            return self._network(x)
        if key not in self._recordings:
            source = x.clone(memory_format=torch.channels_last)
            self._recordings[key] = self._record(source)
        replay, source, result = self._recordings[key]
        source.copy_(x)
        replay()
        return result

    def _record(self, source: Tensor) -> tuple[Callable[[], None], Tensor, Tensor]:
        aside, graph = torch.cuda.Stream(source.device), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._network(source)
        torch.cuda.current_stream(source.device).wait_stream(aside)
        with torch.cuda.device(source.device), torch.cuda.graph(graph):
            result = self._network(source)
        return graph.replay, source, result


def recorded_for_training(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> nn.Module:
    """``model`` whose forward and backward passes are recorded, for inputs like ``x``.

    Args:
        model: in training mode; keeps its own forward and its batch statistics.
        x: an input, on the model's device.
        dtype: of autocast.
    Returns: a module that shares the weights; its gradients reach them. It raises ValueError for
        inputs of another shape.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    network = _Whole(model, dtype).train()
    with (
        recording(),
        torch.cuda.device(x.device),
        torch.autocast(x.device.type, enabled=False),
    ):
        # gives the module's forward another body
        torch.cuda.make_graphed_callables(network, (torch.zeros_like(x),), WARM_UP)
    for buffer, before in buffers:
        buffer.copy_(before)
    return _Checked(network, x)


class _Whole(nn.Module):
    """A network with its autocast; recording replaces this module's forward and not the model's."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        # a cache of converted weights would outlive the recording
        with autocast(x.device, self.dtype, cached=False):
            y: Tensor = self.model(x)
            return y


class _Checked(nn.Module):
    """A recording, which would take another shape for its own."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.network, self.shape, self.stride = network, x.shape, x.stride()

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape, x.stride()) != (self.shape, self.stride):
            raise ValueError(f"the recorded network takes {list(self.shape)}, got {list(x.shape)}")
        y: Tensor = self.network(x)
        return y
