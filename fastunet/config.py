"""How to train: every setting of a run, checked before it starts."""

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from .augment import Augmentation


@dataclass(frozen=True)
class Config:
    """How to train.

    Args:
        steps: optimiser steps.
        batch: tiles a step, of all processes together.
        accumulate: parts that a process goes through its tiles of a step in, for memory's sake.
        tile: height and width of an input tile, in pixels; one that fits the network.
        optimizer: "sgd" (the paper's, momentum 0.99) or "adamw".
        lr: learning rate, the peak for "one-cycle".
        momentum: of SGD.
        weight_decay: of either optimiser.
        schedule: of the learning rate: "one-cycle" (up over the first tenth, then down along a
            cosine), "constant", "cosine" or "poly", as ``learning_rate`` has them.
        warmup: steps over which the learning rate rises; None for what the schedule has.
        clip_norm: largest norm of a step's gradient, which is scaled down to it; None for any.
        ema: decay D of the weights' average, a <- D a + (1 - D) w after each step, which is what is
            validated and what a checkpoint's network is; None for no average.
        rare_classes: probability that a tile is drawn around a pixel of a class that is drawn with
            equal probability among those that occur, instead of anywhere.
        w0: height of the border term of the weight map; 0 for none.
        sigma: width of the border term, in pixels.
        class_weight: "balanced" gives all classes equal weight in sum over the training set.
        precision: "auto", "float32", "bfloat16" or "float16" (of the forward pass, under autocast;
            float16 with a scaled loss).
        validate_every: steps between validations and checkpoints.
        patience: validations in a row without a lower loss that end the run; None to go on.
        deterministic: let PyTorch use deterministic algorithms alone, and fail where it has none.
        cuda_graph: record the network's kernels and launch them together; None for where that can
            be, on one GPU without accumulation.
        seed: of weights, tiles, augmentation and dropout.
        augmentation: what is drawn for each tile.
    Raises: ValueError for values out of range.
    Source: Ronneberger et al. 2015, section 3; Micikevicius et al. 2018 (scaled loss); Pascanu et
        al. 2013 (clipped norm).
    """

    steps: int = 2000
    batch: int = 1
    accumulate: int = 1
    tile: int = 316
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.99
    weight_decay: float = 0.0
    schedule: Literal["one-cycle", "constant", "cosine", "poly"] = "one-cycle"
    warmup: int | None = None
    clip_norm: float | None = None
    ema: float | None = None
    rare_classes: float = 0.0
    w0: float = 10.0
    sigma: float = 5.0
    class_weight: Literal["balanced", "none"] = "balanced"
    precision: str = "auto"
    validate_every: int = 250
    patience: int | None = None
    deterministic: bool = False
    cuda_graph: bool | None = None
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "tile", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("lr", "sigma"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"train: {name} must be > 0, got {getattr(self, name)}")
        for name in ("w0", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"train: {name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train: momentum must be within 0..1, got {self.momentum}")
        if not 0 <= self.rare_classes <= 1:
            raise ValueError(f"train: rare_classes must be within 0..1, got {self.rare_classes}")
        if self.clip_norm is not None and not 0 < self.clip_norm < inf:
            raise ValueError(f"train: clip_norm must be > 0, got {self.clip_norm}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"train: ema must be between 0 and 1, got {self.ema}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"train: patience must be >= 1, got {self.patience}")
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"train: warmup must be from 0 to less than the {self.steps} steps, "
                f"got {self.warmup}"
            )
        if self.cuda_graph and self.accumulate > 1:
            raise ValueError(
                f"train: cuda_graph records whole batches, got accumulate {self.accumulate}"
            )
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("one-cycle", "constant", "cosine", "poly")),
            ("class_weight", ("balanced", "none")),
            ("precision", ("auto", "float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in allowed:
                got = repr(getattr(self, name))
                raise ValueError(f"train: {name} must be {' or '.join(allowed)}, got {got}")


def settings(config: Config) -> dict[str, Any]:
    """The settings that a resumed run must share: those that decide what is learnt."""
    values = asdict(config)
    del values["accumulate"], values["cuda_graph"]
    return values
