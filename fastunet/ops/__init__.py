"""The public operators; each falls back to plain PyTorch where no kernel serves."""

from . import eager
from .conv_relu import conv_relu, conv_relu_pair, use_winograd
from .conv_softmax import conv_argmax, conv_softmax
from .crop_concat import crop_concat
from .folding import conv_norm_relu
from .up_conv import up_conv
from .weight_map import separate_touching, weight_map
from .weighted_cross_entropy import weighted_cross_entropy

__all__ = [
    "conv_argmax",
    "conv_norm_relu",
    "conv_relu",
    "conv_relu_pair",
    "conv_softmax",
    "crop_concat",
    "eager",
    "separate_touching",
    "up_conv",
    "use_winograd",
    "weight_map",
    "weighted_cross_entropy",
]
