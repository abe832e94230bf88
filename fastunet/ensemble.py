"""What a prediction asks of a tile: one network, or the mean over several and over orientations.

Probabilities are averaged, and classes told apart by the mean.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from . import graphs
from .devices import autocast as autocast_context
from .layers import decided, lowered
from .unet import UNet

# tiles [B, C, H, W] to results [B, ..., H', W']
Run = Callable[[NDArray[np.float32]], NDArray[Any]]


def networks(model: UNet | Sequence[UNet]) -> tuple[UNet, ...]:
    """The networks that predict together, one or several.

    Raises: ValueError for none, and for one whose results the first one's cannot be averaged with.
    """
    models = tuple(model) if isinstance(model, Sequence) else (model,)
    if not models:
        raise ValueError("predict: model must be a network or several, got none")
    for number, other in enumerate(models[1:], 2):
        if unlike := difference(models[0], other):
            raise ValueError(f"predict: network {number} has {unlike[0]}, the first {unlike[1]}")
    return models


def difference(first: UNet, other: UNet) -> tuple[str, str] | None:
    """Where ``other`` is not like ``first`` as a mean of their results needs it.

    Widths, normalisation, dropout and variant may differ.

    Returns: what the other has and what the first, such as ("3 classes", "2"), or None.
    """
    for (name, want), got in zip(_traits(first).items(), _traits(other).values(), strict=True):
        if got != want:
            return name.format(got), str(want)
    return None


def _traits(model: UNet) -> dict[str, object]:
    """What networks whose results are averaged must share, by the words for it in an error."""
    parameter = next(model.parameters())
    return {
        "{} channels": model.in_channels,
        "{} classes": model.n_classes,
        "activation {}": model.activation,
        "{} levels": model.levels,
        "padding {}": model.padding,
        "up {}": model.up,
        "odd {}": model.odd,
        "device {}": parameter.device,
        "dtype {}": parameter.dtype,
    }


@contextmanager
def running(
    models: Sequence[UNet],
    output: str,
    autocast: torch.dtype | None,
    tta: bool,
    cuda_graph: bool | None,
) -> Iterator[Run]:
    """What makes results of tiles: in evaluation mode, with weights that are converted once.

    ``output`` is "probability", "label" or "foreground", the last class's probability.
    """
    parameter = next(models[0].parameters())
    device, dtype = parameter.device, parameter.dtype
    records = device.type == "cuda" if cuda_graph is None else cuda_graph
    averages = tta or len(models) > 1
    asked = {"output": "label" if output == "label" and not averages else "probability"}

    def prepared(model: UNet) -> Callable[[Tensor], Tensor]:
        weights = lowered(model, autocast)

        def forward(x: Tensor) -> Tensor:
            y: Tensor = functional_call(model, weights, (x,), asked)
            return y

        patience = 0 if cuda_graph else graphs.PATIENCE
        return graphs.Recorded(forward, patience) if records else forward

    with _evaluating(models), autocast_context(device, autocast, cached=not records):
        each = [prepared(model) for model in models]
        network = each[0] if len(each) == 1 else partial(_mean, each)

        def run(tiles: NDArray[np.float32]) -> NDArray[Any]:
            x = torch.from_numpy(tiles).to(device, dtype, memory_format=torch.channels_last)
            y = _turned_mean(network, x) if tta else network(x)
            if output == "foreground":
                y = y[:, -1]
            elif output == "label" and averages:
                y = decided(y)
            return np.asarray(y.cpu().numpy())

        yield run


@contextmanager
def _evaluating(models: Sequence[UNet]) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _mean(each: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """The mean of the networks' results for ``x``."""
    return torch.as_tensor(sum(network(x) for network in each) / len(each))


def _turned_mean(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The mean of the network's results for ``x`` in eight orientations, turned back."""
    total: Tensor | float = 0.0
    for turns, flipped in product(range(4), (False, True)):
        seen = (x.flip(-1) if flipped else x).rot90(turns, (-2, -1))
        y = network(seen).rot90(-turns, (-2, -1))
        total = total + (y.flip(-1) if flipped else y)
    return torch.as_tensor(total / 8)
