"""What a training step changes: a network and its optimiser, here or in several processes.

A step's batch is divided among processes, and in each into parts that fit its memory. Whatever the
division, the noise of dropout is that of the undivided batch.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import distributed, graphs
from .checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_trained,
    restore_optimizer,
    save_checkpoint,
)
from .config import Config, settings
from .devices import autocast_dtype
from .layers import ConvPair
from .unet import UNet


class Learner:
    """A network with what its training needs.

    Args:
        model: the network, on the device to train on.
        config: how to train.
    """

    def __init__(self, model: UNet, config: Config) -> None:
        self.model, self.config = model, config
        self.optimizer = _optimizer(model, config)
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.average: AveragedModel | None = None
        if config.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.network: nn.Module = model
        if distributed.count() > 1:
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._records = config.cuda_graph
        if config.cuda_graph is None and config.accumulate == 1:
            self._records = not graphs.unsupported_in_training(model, distributed.count())
        self._pairs = [pair for pair in model.modules() if isinstance(pair, ConvPair)]
        if distributed.count() * config.accumulate > 1:
            for pair in self._pairs:
                pair.dropout = PartialDropout(pair.dropout.p, config.batch)

    @property
    def result(self) -> UNet:
        """The network that training gives: the one that is trained, or its average."""
        return self.model if self.average is None else cast(UNet, self.average.module)

    def forward(self, images: Tensor, first: int) -> Tensor:
        """Logits of a part of the batch, which begins with the batch's sample ``first``."""
        if self._records and self.network is self.model:
            dtype = autocast_dtype(images.device, self.config.precision)
            self.network = graphs.recorded_for_training(self.model, images, dtype)
        # each part starts the noise of the whole batch anew
        torch.manual_seed(torch.initial_seed())
        for pair in self._pairs:
            if isinstance(pair.dropout, PartialDropout):
                pair.dropout.first = first
        return self.network(images)

    def step(self) -> None:
        """Follow the gradients of a scaled loss; where they overflow, only the scale changes."""
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def close(self) -> None:
        """Give the network its own dropout back."""
        for pair in self._pairs:
            pair.dropout = nn.Dropout(pair.dropout.p)

    def gradients_stay(self, stay: bool) -> AbstractContextManager[None]:
        """Where gradients are added up in this process and not sent to the others yet."""
        if stay and isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        save_checkpoint(
            path,
            self.result,
            self.optimizer,
            {**state, "scaler": self.scaler.state_dict()},
            trained=None if self.average is None else self.model,
        )

    def restore(self, path: Path, run: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Load the checkpoint at ``path`` if it belongs to the same ``run``; its state.

        Raises: CheckpointError if the file cannot be read or holds no run; ValueError, with what
            was and is, if its settings differ.
        """
        saved, tensors, state = load_checkpoint(path)
        if "resumes" not in state:
            raise CheckpointError(f"{path}: holds no run to resume")
        for kind, old in state.pop("resumes").items():
            # a setting that is younger than the checkpoint was at its default
            old = {**settings(Config()), **old} if kind == "run" else old
            changed = [key for key, value in run[kind].items() if old.get(key) != value]
            if changed:
                was = ", ".join(f"{key} {old.get(key)} (now {run[kind][key]})" for key in changed)
                raise ValueError(f"{path}: the {kind} to resume had {was}")
        self.result.load_state_dict(saved.state_dict())
        if self.average is not None:
            self.model.load_state_dict(load_trained(path))
            self.average.n_averaged.fill_(state["step"])
        restore_optimizer(self.optimizer, tensors)
        # an older checkpoint has none
        if scale := state.pop("scaler", None):
            self.scaler.load_state_dict(scale)
        return state


class PartialDropout(nn.Dropout):
    """Drops from a part of a batch what it would drop from the whole.

    Args:
        p: probability of a value to be dropped.
        batch: samples of the whole batch; ``first`` is the number of the part's first one.
    """

    def __init__(self, p: float, batch: int) -> None:
        super().__init__(p)
        self.batch, self.first = batch, 0

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        if not self.training:
            return x
        # noise is drawn in the order of memory
        dense = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if dense else torch.contiguous_format
        ones = torch.empty(
            (self.batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout
        ).fill_(1)
        noise = F.dropout(ones, self.p)
        return x * noise[self.first : self.first + x.shape[0]]


def _optimizer(model: UNet, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
