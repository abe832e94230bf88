"""U-Nets, fast: fused operators, a U-Net and a trainer that run on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import backends, ops
from .accelerate import accelerate
from .losses import WeightedCrossEntropyLoss
from .ops import (
    conv_argmax,
    conv_relu,
    conv_relu_pair,
    conv_softmax,
    crop_concat,
    separate_touching,
    up_conv,
    use_winograd,
    weight_map,
    weighted_cross_entropy,
)
from .predict import predict
from .unet import UNet

if TYPE_CHECKING:
    from .checkpoint import load_model

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # reading checkpoints needs more than torch: imported when first asked for
    if name == "load_model":
        return import_module(".checkpoint", __name__).load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "UNet",
    "WeightedCrossEntropyLoss",
    "accelerate",
    "backends",
    "conv_argmax",
    "conv_relu",
    "conv_relu_pair",
    "conv_softmax",
    "crop_concat",
    "load_model",
    "ops",
    "predict",
    "separate_touching",
    "up_conv",
    "use_winograd",
    "weight_map",
    "weighted_cross_entropy",
]
