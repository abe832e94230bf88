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
        schedule: "constant", or "one-cycle": up over the first tenth, then down along a cosine.
        w0: height of the border term of the weight map; 0 for none.
        sigma: width of the border term, in pixels.
        class_weight: "balanced" gives all classes equal weight in sum over the training set.
        precision: "auto", "float32" or "bfloat16" (of the forward pass, under autocast).
        validate_every: steps between validations and checkpoints.
        seed: of weights, tiles, augmentation and dropout.
        augmentation: what is drawn for each tile.
    Raises: ValueError for values out of range.
    Source: Ronneberger et al. 2015, section 3.
    """

    steps: int = 2000
    batch: int = 1
    accumulate: int = 1
    tile: int = 316
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.99
    weight_decay: float = 0.0
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    w0: float = 10.0
    sigma: float = 5.0
    class_weight: Literal["balanced", "none"] = "balanced"
    precision: str = "auto"
    validate_every: int = 250
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
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("one-cycle", "constant")),
            ("class_weight", ("balanced", "none")),
            # float16 would need its loss scaled
            ("precision", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                got = repr(getattr(self, name))
                raise ValueError(f"train: {name} must be {' or '.join(allowed)}, got {got}")


def settings(config: Config) -> dict[str, Any]:
    """The settings that a resumed run must share: those that decide what is learnt."""
    values = asdict(config)
    del values["accumulate"]
    return values
