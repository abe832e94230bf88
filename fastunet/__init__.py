"""U-Nets, fast: fused operators, a U-Net and a trainer that run on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import backends as _backends  # the native operators, where they are built
from . import ops
from .losses import WeightedCrossEntropyLoss
from .ops import (
    conv_relu,
    crop_concat,
    separate_touching,
    weight_map,
    weighted_cross_entropy,
)
from .unet import UNet

if TYPE_CHECKING:
    from .checkpoint import load_model
    from .predict import predict

__version__ = "0.1.0"

# what reads files or scores needs more than torch: imported when first asked for
_LAZY = {"load_model": ".checkpoint", "predict": ".predict"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "UNet",
    "WeightedCrossEntropyLoss",
    "conv_relu",
    "crop_concat",
    "load_model",
    "ops",
    "predict",
    "separate_touching",
    "weight_map",
    "weighted_cross_entropy",
]
